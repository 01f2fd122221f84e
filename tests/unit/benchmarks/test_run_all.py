"""All benchmarks in one go: what goes on after a kill, what is compared, what is reported."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import run_all
import torch
from catalogue import CATALOGUE, Benchmark
from figures import Figure
from run_records import KindRecord, Run, compare, kind_of
from run_report import said

from megatron.early_exit.evaluation.records import RecordFile
from megatron.early_exit.hardware.dtypes import VARIABLE

NAMES = ("first", "second", "third")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Three benchmarks of a minute, and no records."""
    found = tuple(
        Benchmark(
            name=name,
            area="decoding" if name == "third" else "training",
            script=f"{name}.py",
            flags="--rounds 5",
            minutes=1,
            quick_minutes=0.1,
        )
        for name in NAMES
    )
    monkeypatch.setattr(run_all, "CATALOGUE", found)
    monkeypatch.setattr(run_all, "_NAMES", list(NAMES))
    monkeypatch.setattr(run_all, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    # Measuring it takes some seconds on a busy machine.
    monkeypatch.setenv(VARIABLE, "fp32")


def figure(value: float = 2.0, **fields: object) -> Figure:
    return Figure(**{"name": "speed", "value": value, "setting": {"batch": 8}, **fields})


def run_of(name: str, value: float = 2.0, **fields: object) -> Run:
    known = {"arguments": ["--rounds", "5"], "seconds": 30.0, "load": 0.1, "date": "2026-11-30"}
    figures = [figure(value, bound=1.0, limit=2.5, spread=(value - 0.1, value + 0.1))]
    return Run(**{"name": name, "figures": figures, **known, **fields})


class Runner:
    """Stands in for processes: notes which benchmarks are run, and fails where it is told to."""

    def __init__(self, **values: float | str) -> None:
        self.values, self.names = values, []

    def __call__(self, benchmark, arguments, folder, limit_s) -> Run:
        assert limit_s >= 60
        self.names.append(benchmark.name)
        value = self.values.get(benchmark.name, 2.0)
        if value == "killed":
            raise KeyboardInterrupt
        if isinstance(value, str):
            return run_of(benchmark.name, arguments=list(arguments), figures=[], error=value)
        return run_of(benchmark.name, value, arguments=list(arguments))


def campaign(folder: Path, *flags: str, record: KindRecord | None = None, clock=lambda: 0.0):
    args = run_all.build_parser().parse_args(["--out", str(folder), *flags])
    file = RecordFile(folder / "runs.jsonl", {"kind": "avx2-2-cores"})
    return run_all.Campaign(args, record or KindRecord("avx2-2-cores"), file, clock)


# --- which kind of machine -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "fast", "kind"),
    [
        ({"instruction_set": "AVX2", "cores": 2}, False, "avx2-2-cores"),
        ({"instruction_set": "AVX512", "cores": 16}, True, "avx512+bf16-16-cores"),
        ({"instruction_set": "AVX512", "cores": 2}, False, "avx512-2-cores"),
        ({"instruction_set": "AVX2", "cores": 2, "gpu": "NVIDIA H100 80GB HBM3"}, True,
         "nvidia-h100-80gb-hbm3"),
    ],
)  # fmt: skip
def test_kinds_of_machines(machine, fast, kind):
    assert kind_of(machine, fast) == kind


@pytest.mark.parametrize(
    ("instructions", "formats", "kind"),
    [("AVX512", "fp32,bf16", "avx512+bf16"), ("AVX2", "fp32", "avx2")],
)
def test_the_list_is_of_this_kind_of_machine(instructions, formats, kind, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setenv(VARIABLE, formats)
    assert run_all.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"kind of machine: {kind}-")
    assert [line.split()[0] for line in lines[1:-1]] == list(NAMES)
    assert "0:01:00 estimated first.py --rounds 5" in " ".join(lines[1].split())
    assert lines[-1].split() == ["all", "of", "them", "0:03:00"]


def test_the_whole_set_says_how_long_it_takes():
    assert len({one.name for one in CATALOGUE}) == len(CATALOGUE)
    assert all(one.estimate_s(True) <= one.estimate_s(False) for one in CATALOGUE)


# --- what is run -----------------------------------------------------------------------------


def test_after_a_kill_it_goes_on_with_what_is_missing(tmp_path, capsys):
    killed = Runner(second="killed")
    with pytest.raises(KeyboardInterrupt):
        campaign(tmp_path).run(killed)
    assert killed.names == ["first", "second"]
    resumed = campaign(tmp_path)
    rest = Runner(second="ended with status 1: no")
    resumed.run(rest)
    assert rest.names == ["second", "third"]
    assert "1 of 3 are done already" in capsys.readouterr().err
    # What has failed is tried again.
    again = Runner()
    campaign(tmp_path).run(again)
    assert again.names == ["second"]
    nothing = Runner()
    campaign(tmp_path).run(nothing)
    assert nothing.names == []


def test_other_flags_are_another_run(tmp_path):
    campaign(tmp_path, "--only", "first").run(Runner())
    python = tmp_path / "python"
    python.touch()
    flags = ("--openvino-python", str(python))
    peers = Benchmark(name="peers", area="peers", script="p.py", minutes=1, quick_minutes=1)
    assert campaign(tmp_path, *flags).arguments(peers) == list(flags)
    assert campaign(tmp_path).arguments(peers) == []
    quick = campaign(tmp_path, "--quick", "--only", "first")
    runner = Runner()
    quick.run(runner)
    assert runner.names == ["first"]


def test_progress_says_the_time_left_by_what_is_recorded(tmp_path, capsys):
    record = KindRecord("avx2-2-cores")
    record.keep(run_of("second", seconds=600.0), {})
    campaign(tmp_path, record=record).run(Runner())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 3: first, about 0:01:00, 0:12:00 left in all"
    assert lines[2] == "2 of 3: second, about 0:10:00, 0:11:00 left in all"
    assert lines[3] == "  1 figures, 0 bounds missed, after 0:00:30"


def test_a_budget_leaves_out_what_would_take_longer(tmp_path, capsys):
    times = iter([0.0, 0.0, 50.0, 50.0])
    record = KindRecord("avx2-2-cores")
    record.keep(run_of("second", seconds=600.0), {})
    runner = Runner()
    one = campaign(tmp_path, "--minutes", "2", record=record, clock=lambda: next(times))
    one.run(runner)
    assert runner.names == ["first", "third"]
    assert "second would take 0:10:00, more than is left" in capsys.readouterr().err
    assert one.report({}).not_run == ["second"]


SCRIPTS = {
    "figures": ("{write}", None),
    "missed": ("{write}; sys.exit(1)", None),
    "crash": ("raise ValueError('no such model')", "ended with status 1: ValueError: no such"),
    "silent": ("pass", "has no figures: it says nothing"),
    "reason": ("print('demo: no checkpoint here')", "has no figures: demo: no checkpoint here"),
    "killed": ("{write}; os.kill(os.getpid(), 9)", "ended with status -9"),
    "damaged": ("target.write_text('[')", "has no figures of a benchmark"),
    "hangs": ("{write}; time.sleep(60)", "took longer than 2 s"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_process_leaves_behind(tmp_path, name):
    code, error = SCRIPTS[name]
    content = json.dumps({"figures": [figure().as_dict()]})
    code = code.replace("{write}", f"target.write_text({content!r})")
    lines = "import os, sys, time\nfrom pathlib import Path\ntarget = Path(sys.argv[-1])"
    (tmp_path / "first.py").write_text(f"{lines}\n{code}\n")
    # Of an earlier run.
    (tmp_path / "first.json").write_text(json.dumps({"figures": [figure(9.0).as_dict()]}))
    benchmark = run_all.CATALOGUE[0]
    limit = 2.0 if name == "hangs" else 60.0
    run = run_all.run_process(benchmark, ["--rounds", "5"], tmp_path, limit)
    if error is None:
        assert run.error == ""
        assert run.figures == [figure()]
    else:
        assert error in run.error
        assert run.figures == []
    assert run.arguments == ["--rounds", "5"]
    assert run.seconds < 60
    assert (tmp_path / "first.log").exists()


def test_the_benchmark_itself_is_no_other_work(tmp_path, monkeypatch):
    """In five seconds two cores were busy for 6.5 in all, 4 of which are the benchmark's."""
    moments = iter([(100.0, 10.0, 50.0), (104.0, 12.5, 53.5)])
    own = iter([20.0, 24.0])

    def cpu_times():
        user, steal, idle = next(moments)
        return Times(user, 0.0, steal, idle)

    def times():
        return os.times_result((0.0, 0.0, next(own), 0.0, 0.0))

    monkeypatch.setattr(run_all.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(run_all.os, "times", times)
    clock = iter([0.0, 5.0])
    monkeypatch.setattr(run_all.time, "monotonic", lambda: next(clock))
    (tmp_path / "first.py").write_text("")
    monkeypatch.setattr(run_all, "started", lambda *_, **__: nullcontext(Ended()))
    run = run_all.run_process(run_all.CATALOGUE[0], [], tmp_path, 60.0)
    assert (run.seconds, run.load) == (5.0, 0.5)


class Times(NamedTuple):
    """Seconds of all cores together, named as `psutil.cpu_times` names them."""

    user: float
    system: float
    steal: float
    idle: float


class Ended:
    """A process that has ended."""

    def wait(self, timeout: float) -> int:
        return 0


# --- what is compared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "before", "now", "change"),
    [
        ("higher", 2.0, 1.81, "the same"),
        ("higher", 2.0, 1.79, "worse"),
        ("higher", 2.0, 2.21, "better"),
        ("lower", 2.0, 2.19, "the same"),
        ("lower", 2.0, 2.21, "worse"),
        ("lower", 2.0, 1.79, "better"),
        ("lower", 0.0, 1.0, "worse"),
        ("lower", 0.0, 0.0, "the same"),
        (None, 2.0, 1.0, "not compared"),
    ],
)
def test_a_figure_beside_that_of_an_earlier_run(better, before, now, change):
    (found,) = compare([figure(now, better=better)], [figure(before, better=better)], 0.1)
    assert found.change == change


def test_figures_are_compared_with_those_of_the_same_setting():
    others = [figure(9.0, setting={"batch": 1}), figure(9.0, name="memory")]
    (found,) = compare([figure(2.0)], others, 0.1)
    assert (found.before, found.change) == (None, "new")
    (found,) = compare([figure(2.0)], [*others, figure(2.0)], 0.1)
    assert (found.before, found.change) == (figure(2.0), "the same")


def test_a_run_with_other_flags_is_not_compared():
    record = KindRecord("avx2-2-cores")
    record.keep(run_of("first"), {})
    assert record.run_like("first", ["--rounds", "5"]) == run_of("first")
    assert record.run_like("first", ["--rounds", "9"]) is None
    assert record.run_like("second", ["--rounds", "5"]) is None


def test_records_are_kept_by_kind_and_damaged_ones_refused(tmp_path):
    record = KindRecord("avx2-2-cores")
    record.keep(run_of("first"), {"machine": {"cores": 2}})
    path = record.save(tmp_path)
    assert path.name == "avx2-2-cores.json"
    again = KindRecord.load("avx2-2-cores", tmp_path)
    assert again.runs == json.loads(path.read_text())["runs"]
    assert again.run_like("first", ["--rounds", "5"]) == run_of("first")
    assert KindRecord.load("avx512-2-cores", tmp_path).runs == {}
    path.write_text('{"runs": {"first": {"name": "first"}}}')
    with pytest.raises(ValueError, match=r"avx2-2-cores\.json is no record of benchmarks"):
        KindRecord.load("avx2-2-cores", tmp_path)


# --- the command -----------------------------------------------------------------------------


def test_records_then_tells_what_has_become_worse(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "run_process", Runner(third="ended with status 1: no"))
    first = ["--out", str(tmp_path / "before"), "--record"]
    assert run_all.main(first) == 1
    said_first = capsys.readouterr().out
    assert "failed: third: ended with status 1: no" in said_first
    (path,) = (tmp_path / "records").iterdir()
    assert set(json.loads(path.read_text())["runs"]) == {"first", "second"}

    monkeypatch.setattr(run_all, "run_process", Runner(first=0.9, second=1.9))
    out = tmp_path / "now"
    assert run_all.main(["--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "worse than recorded: first: speed, batch 8: 2 -> 0.900 x" in printed
    assert "1 of the bounds are missed" in printed
    text = (out / "report.md").read_text()
    assert "| speed | batch 8 | 0.900 x | 2.500 | >= 1: **missed** |" in text
    assert "| 2 | **worse** |" in text
    assert "| 2 | the same |" in text
    assert "![training](training.svg)" in text
    for arguments in ("- kind of machine: ", "- commit: ", "- lock: ", " cores, "):
        assert arguments in text
    report = json.loads((out / "report.json").read_text())
    changes = {run["name"]: run["figures"][0]["change"] for run in report["runs"]}
    assert changes == {"first": "worse", "second": "the same", "third": "new"}
    assert report["software"]["lock"]
    for area in ("training", "decoding"):
        assert "<svg" in (out / f"{area}.svg").read_text()

    # With a wider margin nothing is worse; what is there is not run again.
    monkeypatch.setattr(run_all, "run_process", Runner(first="killed"))
    assert run_all.main(["--out", str(out), "--margin", "0.6"]) == 0


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "run_process", Runner())
    assert run_all.main(["--out", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert run_all.main(["--out", str(tmp_path / "a"), "--quick"]) == 2
    assert "quick was false there and is true now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0.0 is out of range, allowed: above 0"),
        (["--margin", "-1"], "--margin -1.0 is out of range, allowed: 0 or more"),
        (["--record", "--quick"], "--record has no effect with --quick"),
        (["--record", "--list"], "--record has no effect with --list"),
        (["--openvino-python", "/none"], "--openvino-python /none is no file, allowed:"),
        (["--out", __file__], "is a file, allowed: a folder"),
    ],
)
def test_flags_that_are_refused(flags, message, capsys):
    assert run_all.main(flags) == 2
    assert message in capsys.readouterr().err


def test_settings_as_people_read_them():
    assert said({"batch": 8, "dtype": "bf16"}) == "batch 8, dtype bf16"
    assert said({}) == "no settings"
