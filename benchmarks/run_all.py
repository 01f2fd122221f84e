"""Run all benchmarks, and compare their figures with those recorded on the same kind of machine.

    python benchmarks/run_all.py --list
    python benchmarks/run_all.py [--only decode-batch-1 peers] [--minutes 60] [--record]
    python benchmarks/run_all.py --quick --out runs/quick

Each benchmark is a process of its own, and writes its figures to a file in the folder --out. If the
command is killed, or has used up its --minutes, the same command goes on where it has ended. A
benchmark that fails is named at the end, and the others run. The report is in the same folder:
report.md, report.json and a picture for each area.

The exit status is 1 if a benchmark has failed, or a figure is worse than the recorded one by more
than --margin. A figure that misses its bound is marked in the report, but is no failure here.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from catalogue import CATALOGUE, FOLDER, Benchmark
from figures import clock_text, read_figures
from run_records import RECORDS, KindRecord, Run, compare, kind_of
from run_report import Entry, Report

from megatron.early_exit.errors import one_line
from megatron.early_exit.evaluation.provenance import machine, software
from megatron.early_exit.evaluation.records import RecordFile
from megatron.early_exit.hardware.dtypes import dtype_speed
from megatron.early_exit.process_family import run_program, started
from megatron.early_exit.ranges import ABOVE_ZERO, ZERO_OR_MORE

REPOSITORY = FOLDER.parent
OUT, MARGIN = REPOSITORY / "runs" / "benchmarks", 0.1
_LEAST_LIMIT_S, _PATIENCE = 900.0, 5.0
"""A benchmark is ended after so many seconds, or so many times what it should take."""
_NAMES = [one.name for one in CATALOGUE]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=_NAMES, metavar="NAME", help="default: all, see --list")
    add("--quick", action="store_true", help="small sizes, to see that everything runs")
    add("--out", type=Path, metavar="FOLDER", help=f"default: {OUT.relative_to(REPOSITORY)}")
    add("--minutes", type=float, help="begin nothing that would take longer in all")
    margin = f"share by which a figure may be worse than the recorded one (default: {MARGIN})"
    add("--margin", type=float, metavar="SHARE", help=margin)
    add("--record", action="store_true", help="these become the recorded figures of this kind")
    add("--openvino-python", type=Path, metavar="PATH", help="see peers.py")
    add("--list", action="store_true", help="say what there is and how long it takes, run nothing")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse invalid flags before anything is run, and fill in the defaults of others.

    Raises:
        ValueError: one of them is out of range or without effect, or a file or folder is missing.
    """
    ABOVE_ZERO.check_flags(args, "minutes")
    ZERO_OR_MORE.check_flags(args, "margin")
    if args.record and args.quick:
        raise ValueError("--record has no effect with --quick: what is recorded is of full runs")
    if args.openvino_python is not None and not args.openvino_python.is_file():
        raise ValueError(
            f"--openvino-python {args.openvino_python} is no file, allowed: an interpreter"
        )
    if args.openvino_python is not None and "peers" not in (args.only or _NAMES):
        raise ValueError("--openvino-python has no effect where --only leaves peers out")
    if args.list:
        for name in ("minutes", "record", "margin", "out"):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--{name} has no effect with --list")
    args.margin = MARGIN if args.margin is None else args.margin
    args.out = OUT if args.out is None else args.out
    if args.list:
        return
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, allowed: a folder")


@dataclass
class Campaign:
    """All that is run with one folder.

    Attributes:
        args: the command line.
        record: what is recorded of this kind of machine.
        file: has the runs that have ended, whichever command began them.
        clock: seconds that go by.
    """

    args: argparse.Namespace
    record: KindRecord
    file: RecordFile | None = None
    clock: Callable[[], float] = time.monotonic
    _begun_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun_s = self.clock()

    @property
    def wanted(self) -> list[Benchmark]:
        """The benchmarks that were chosen, in the catalogue's order."""
        return [one for one in CATALOGUE if one.name in (self.args.only or _NAMES)]

    def arguments(self, benchmark: Benchmark) -> list[str]:
        """The flags of a benchmark."""
        extra: list[str] = []
        if benchmark.name == "peers" and self.args.openvino_python is not None:
            extra = ["--openvino-python", str(self.args.openvino_python.absolute())]
        return benchmark.arguments(self.args.quick, extra)

    def expected_s(self, benchmark: Benchmark) -> float:
        """Seconds that a benchmark takes: what is recorded, else the estimate."""
        known = self.record.run_like(benchmark.name, self.arguments(benchmark))
        return known.seconds if known is not None else benchmark.estimate_s(self.args.quick)

    def done(self, benchmark: Benchmark) -> Run | None:
        """The last run of a benchmark with these flags."""
        assert self.file is not None
        runs = [Run.from_dict(one) for one in self.file.records if one["name"] == benchmark.name]
        same = [run for run in runs if run.arguments == self.arguments(benchmark)]
        return same[-1] if same else None

    def run(self, run_one: Callable[[Benchmark, Sequence[str], Path, float], Run]) -> None:
        """Run what is missing, or has failed before; each run is in the file when it has ended."""
        assert self.file is not None
        ended = {one.name: self.done(one) for one in self.wanted}
        missing = [one for one in self.wanted if (run := ended[one.name]) is None or run.error]
        if len(missing) < len(self.wanted):
            _tell(f"{len(self.wanted) - len(missing)} of {len(self.wanted)} are done already")
        for number, benchmark in enumerate(missing, 1):
            expected = self.expected_s(benchmark)
            spent = self.clock() - self._begun_s
            if self.args.minutes is not None and spent + expected > 60 * self.args.minutes:
                _tell(f"{benchmark.name} would take {clock_text(expected)}, more than is left")
                continue
            left = sum(self.expected_s(one) for one in missing[number - 1 :])
            _tell(
                f"{number} of {len(missing)}: {benchmark.name}, about {clock_text(expected)}, "
                f"{clock_text(left)} left in all"
            )
            limit = max(_LEAST_LIMIT_S, _PATIENCE * expected)
            run = run_one(benchmark, self.arguments(benchmark), self.args.out, limit)
            self.file.append(run.as_dict())
            missed = sum(figure.passed is False for figure in run.figures)
            found = f"{len(run.figures)} figures, {missed} bounds missed"
            _tell(f"  {run.error or found}, after {clock_text(run.seconds)}")

    def report(self, provenance: dict[str, object]) -> Report:
        """What has been found so far."""
        entries = []
        for benchmark in self.wanted:
            run, arguments = self.done(benchmark), self.arguments(benchmark)
            before = self.record.run_like(benchmark.name, arguments)
            entries.append(
                Entry(
                    benchmark=benchmark,
                    run=run,
                    recorded=None if before is None else self.record.runs[benchmark.name],
                    comparisons=compare(
                        [] if run is None else run.figures,
                        [] if before is None else before.figures,
                        self.args.margin,
                    ),
                )
            )
        return Report(
            kind=self.record.kind,
            provenance=provenance,
            margin=self.args.margin,
            is_quick=self.args.quick,
            entries=entries,
        )


def seconds_of_others() -> float:
    """Seconds that the machine's cores have been kept busy, by this machine or by others that share
    them, less those of processes that this one has started and that have ended."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # What a guest takes is in "user", too.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    own = os.times()
    return sum(times) - guests - idle - own.children_user - own.children_system


def run_process(
    benchmark: Benchmark, arguments: Sequence[str], folder: Path, limit_s: float
) -> Run:
    """Run a benchmark; what it prints goes to a file beside that of its figures.

    Args:
        benchmark: of the catalogue.
        arguments: its flags.
        folder: for both files.
        limit_s: seconds after which it is ended.
    """
    target = folder / f"{benchmark.name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(FOLDER / benchmark.script), *arguments, "--json", str(target)]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    begin, others = time.monotonic(), seconds_of_others()
    with (folder / f"{benchmark.name}.log").open("w+", errors="replace") as log:
        with started(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process:
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
        log.seek(0)
        last = (log.read().strip().splitlines() or ["it says nothing"])[-1]
    seconds = time.monotonic() - begin
    load = max(seconds_of_others() - others, 0.0) / seconds
    error, figures = "", []
    try:
        figures = read_figures(target) if target.exists() else []
    except ValueError as damaged:
        error = one_line(damaged)
    if status is None:
        error = f"took longer than {limit_s:.0f} s"
    elif status < 0 or (status and not figures):
        error = error or f"ended with status {status}: {last}"
    elif not figures:
        error = error or f"has no figures: {last}"
    return Run(
        name=benchmark.name,
        arguments=list(arguments),
        seconds=round(seconds, 1),
        load=round(load, 2),
        date=date,
        figures=[] if error else figures,
        error=error,
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_list(campaign: Campaign) -> None:
    """Print what there is, and how long it takes."""
    print(f"kind of machine: {campaign.record.kind}")
    for benchmark in campaign.wanted:
        arguments = campaign.arguments(benchmark)
        source = "estimated"
        if campaign.record.run_like(benchmark.name, arguments) is not None:
            source = "recorded"
        expected = clock_text(campaign.expected_s(benchmark))
        command = " ".join([benchmark.script, *arguments])
        print(f"{benchmark.name:18}{benchmark.area:11}{expected:>8} {source:10}{command}")
    total = sum(campaign.expected_s(benchmark) for benchmark in campaign.wanted)
    print(f"{'all of them':29}{clock_text(total):>8}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and write the report; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        provenance: dict[str, object] = {"machine": machine(device), "software": software()}
        fast = device.type == "cpu" and dtype_speed(torch.bfloat16).is_fast
        campaign = Campaign(args, KindRecord.load(kind_of(machine(device), fast), RECORDS))
        if args.list:
            show_list(campaign)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        header = {"kind": campaign.record.kind, "quick": args.quick, **provenance}
        campaign.file = RecordFile(args.out / "runs.jsonl", header)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    campaign.run(run_process)
    report = campaign.report(provenance)
    report.write(args.out)
    for title, found in report.troubles.items():
        for one in found:
            print(f"{title.lower()}: {one}")
    print(f"{report.missed} of the bounds are missed; the report is {args.out / 'report.md'}")
    if args.record:
        for run in filter(None, map(campaign.done, campaign.wanted)):
            if not run.error:
                campaign.record.keep(run, provenance)
        print(f"recorded in {campaign.record.save(RECORDS)}")
    return int(bool(report.worse or report.failed))


if __name__ == "__main__":
    sys.exit(run_program(main, "the same command goes on where this one has ended"))
