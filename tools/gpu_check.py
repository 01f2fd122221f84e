"""Check in a few minutes what only a GPU can show: whether everything computes there what it
should, and how fast.

    python tools/gpu_check.py --json gpu.json
    python tools/gpu_check.py --sections versions tests graphs

prints one table. Each section runs in a process of its own with a time limit; one that fails
reports its error, and the others run. The exit status is 1 if a section failed or a goal was
missed. Without a GPU everything runs in small sizes, and what a CPU cannot show is reported as "not
on a CPU". docs/gpu.md says what each line means.

    python tools/gpu_check.py --estimate

prints the least time of a step of decoding on a GPU of --bandwidth as a Markdown table, and
measures nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from gpu_sections.findings import SectionReport, table  # noqa: E402

from megatron.early_exit.errors import one_line  # noqa: E402
from megatron.early_exit.process_family import end_with_parent, started  # noqa: E402
from megatron.early_exit.ranges import ABOVE_ZERO  # noqa: E402

_INTERRUPTED = 130
_CPU_PATIENCE = 3.0
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the check.

    Attributes:
        module: of `benchmarks/gpu_sections`; its function `check_` and this name does the work.
        limit_s: seconds that it may take on a GPU.
    """

    module: str
    limit_s: float


SECTIONS = {
    "versions": Section("versions", 15),
    "tests": Section("marked_tests", 90),
    "attention": Section("attention", 25),
    "graphs": Section("graphs", 90),
    "waits": Section("waits", 50),
    "decoding": Section("decoding", 120),
    "training": Section("training", 35),
    "ee_tuning": Section("ee_tuning", 15),
    "caches": Section("caches", 20),
    "out_of_memory": Section("out_of_memory", 20),
    "two_gpus": Section("two_gpus", 180),
}
"""What can be checked, in this order. On one GPU, where the last one has nothing to do, all take
eight minutes at most."""


def build_parser() -> argparse.ArgumentParser:
    """Define the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, help="default: all")
    add("--device", choices=_DEVICES, help="default: cuda if there is a GPU, else cpu")
    add("--json", type=Path, help="also write everything here, after each section")
    patience = "factor on the time limits of sections (default: 1, on a CPU 3)"
    add("--patience", type=float, metavar="FACTOR", help=patience)
    # The process of a single section, which writes what it finds to this file.
    add("--section-file", type=Path, help=argparse.SUPPRESS)
    group = parser.add_argument_group("estimates")
    add = group.add_argument
    add("--estimate", action="store_true", help="print estimates, and measure nothing")
    add("--bandwidth", type=float, help="of the GPU's memory in TB/s (default: 3.35, an H100's)")
    launch = "microseconds to launch a kernel or a graph (default: 5)"
    add("--launch-time", type=float, metavar="MICROSECONDS", help=launch)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse invalid flags before anything is measured.

    Raises:
        ValueError: one of them is out of range or without effect, or names a file that cannot be
            written.
    """
    ABOVE_ZERO.check_flags(args, "patience", "bandwidth", "launch_time")
    if args.section_file is not None and len(args.sections or ()) != 1:
        raise ValueError("--section-file needs one of --sections")
    if args.estimate:
        for name in ("sections", "device", "json", "patience"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} has no effect with --estimate")
        return
    for name in ("bandwidth", "launch-time"):
        if getattr(args, name.replace("-", "_")) is not None:
            raise ValueError(f"--{name} has no effect without --estimate")
    if args.json is not None:
        if args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder, allowed: a file")
        if not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")


def chosen_device(name: str | None) -> str:
    """The device to check.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda is not possible: PyTorch finds no GPU, allowed: cpu")
    return name or ("cuda" if has_gpu else "cpu")


def run_all(args: argparse.Namespace, device: str) -> list[SectionReport]:
    """Run the sections one after another, each in a process of its own."""
    patience = args.patience or (1.0 if device == "cuda" else _CPU_PATIENCE)
    names = [name for name in SECTIONS if name in (args.sections or SECTIONS)]
    reports: list[SectionReport] = []
    for number, name in enumerate(names, 1):
        limit_s = patience * SECTIONS[name].limit_s
        progress = f"{number} of {len(names)}: {name}, {limit_s:.0f} s at most"
        print(progress, file=sys.stderr, flush=True)
        reports.append(run_process(name, device, limit_s))
        if args.json is not None:
            write_json(args.json, device, reports)
    return reports


def run_process(name: str, device: str, limit_s: float) -> SectionReport:
    """What a section finds, or how its process ended."""
    begin = time.monotonic()
    report = SectionReport(name, device == "cuda")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        file = Path(folder) / "section.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--sections", name]
        command += ["--device", device, "--section-file", str(file)]
        with (Path(folder) / "output").open("w+") as output:
            with started(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=os.environ
            ) as process:
                try:
                    status = process.wait(limit_s)
                except subprocess.TimeoutExpired:
                    status = None
            output.seek(0)
            last = (output.read().strip().splitlines() or [""])[-1]
        report.fill_from(file)
    if status is None:
        report.error = f"took longer than {limit_s:g} s"
    elif status and report.error is None:
        report.error = f"its process ended with status {status}: {last}"
    report.seconds = time.monotonic() - begin
    return report


def run_section(name: str, device: str, file: Path | None) -> SectionReport:
    """Run a section in this process; an exception becomes the error of its report."""
    report = SectionReport(name, device == "cuda", file)
    try:
        import torch
        from gpu_sections.sizes import sizes_for

        where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        _function(name)(report, sizes_for(where))
    except Exception as error:
        # Whatever it is, it is what was found; the other sections say what they find.
        text = one_line(error)[:300]
        report.error = f"{type(error).__name__}: {text}"
        report.save()
    return report


def _function(name: str) -> Callable[[SectionReport, Any], None]:
    from importlib import import_module

    module = SECTIONS[name].module
    function: Callable[[SectionReport, Any], None] = getattr(
        import_module(f"gpu_sections.{module}"), f"check_{module}"
    )
    return function


def write_json(path: Path, device: str, reports: Sequence[SectionReport]) -> None:
    """Write what there is so far."""
    record = {
        "device": device,
        "failed": [one.name for one in reports if one.has_failed],
        "sections": {one.name: one.as_dict() for one in reports},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(args: argparse.Namespace) -> int:
    """Print estimates, or check; returns the exit status.

    Raises:
        ValueError: a flag cannot be used.
    """
    check(args)
    if args.estimate:
        from gpu_sections.estimate import estimate_table

        print(estimate_table(args.bandwidth or 3.35, args.launch_time or 5.0))
        return 0
    device = chosen_device(args.device)
    if args.section_file is not None:
        (name,) = args.sections
        return int(run_section(name, device, args.section_file).error is not None)
    reports = run_all(args, device)
    print(table(reports))
    failed = [one.name for one in reports if one.has_failed]
    minutes = sum(one.seconds for one in reports) / 60
    words = f"failed: {', '.join(failed)}" if failed else "none failed"
    print(f"{len(reports)} sections on {device} in {minutes:.1f} minutes, {words}")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
