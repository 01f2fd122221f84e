"""The command line of tools/gpu_check.py, its processes and its table."""

from __future__ import annotations

import json

import pytest
import torch

from tools import gpu_check

# The tool has put the folder of these on the path.
from gpu_sections import (  # isort: skip
    versions,
)
from gpu_sections.findings import SectionReport, table  # isort: skip


def test_a_failing_section_is_reported_and_the_others_run(monkeypatch, capsys, tmp_path):
    def fails(report, sizes):
        report.measure("before", "1")
        raise RuntimeError("a cable\nis loose")

    monkeypatch.setattr(versions, "check_versions", fails)
    here = lambda name, device, limit_s: gpu_check.run_section(name, device, None)  # noqa: E731
    monkeypatch.setattr(gpu_check, "run_process", here)
    path = tmp_path / "all.json"
    flags = ["--device", "cpu", "--sections", "versions", "out_of_memory", "--json", str(path)]
    assert gpu_check.main(flags) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: a cable is loose" in out
    assert "failed: versions" in out
    record = json.loads(path.read_text())
    assert record["failed"] == ["versions"]
    assert [one["name"] for one in record["sections"]["versions"]["findings"]] == ["before"]
    found = record["sections"]["out_of_memory"]
    assert found["error"] is None
    assert [one["verdict"] for one in found["findings"]] == ["holds", "holds"]


def test_sections_run_in_processes_of_their_own(tmp_path, capsys):
    path = tmp_path / "all.json"
    assert gpu_check.main(["--device", "cpu", "--sections", "versions", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["failed"] == []
    found = record["sections"]["versions"]
    assert found["seconds"] > 0
    names = [one["name"] for one in found["findings"]]
    assert "PyTorch" in names
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_a_section_that_takes_too_long_has_failed(capsys):
    flags = ["--device", "cpu", "--sections", "decoding", "--patience", "0.001"]
    assert gpu_check.main(flags) == 1
    assert "took longer than 0.12 s" in capsys.readouterr().out


def test_a_process_that_dies_has_failed():
    report = gpu_check.run_process("unknown", "cpu", 60)
    assert report.has_failed
    assert "its process ended with status 2" in report.error
    assert "invalid choice" in report.error


def test_all_sections_together_take_eight_minutes_at_most():
    limits = {name: one.limit_s for name, one in gpu_check.SECTIONS.items()}
    # Which has nothing to do on one GPU.
    del limits["two_gpus"]
    assert sum(limits.values()) <= 8 * 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--patience 0", "--patience 0.0 is out of range, allowed: above 0"),
        ("--json {folder}", "is a folder, allowed: a file"),
        ("--json {folder}/no/x.json", "there is no folder"),
        ("--estimate --json x.json", "--json has no effect with --estimate"),
        ("--bandwidth 2", "--bandwidth has no effect without --estimate"),
        ("--estimate --bandwidth nan", "--bandwidth nan is out of range, allowed: above 0"),
    ],
)
def test_flags_that_are_refused(flags, words, tmp_path, capsys):
    assert gpu_check.main(flags.format(folder=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert gpu_check.main(["--device", "cuda"]) == 2
    assert "--device cuda is not possible" in capsys.readouterr().err


def test_a_table_has_a_line_for_each_finding_and_error():
    report = SectionReport("one", on_gpu=False)
    report.measure("speed", "3 m/s")
    report.check("colour", "red", "green", False)
    report.check("height", "2 m", "3 m", False, gpu_only="no stairs")
    report.error = "OSError: gone"
    lines = table([report]).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "",
        "measured",
        "MISSED",
        "not on a CPU",
        "ERROR",
    ]
    assert "2 m (no stairs)" in lines[3]
