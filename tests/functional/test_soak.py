"""The short form of benchmarks/soak.py: each part for some seconds, and what it says of faults."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers.text_server import text_server

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import serve_process
import serve_requests
import soak
import soak_clients
import soak_connections
import soak_hostile
import soak_kills
import soak_server
from soak_report import PartResult


@contextmanager
def _served_here(checkpoint, folder, max_batch_size, threads):
    """In the test's own process, which saves the start of another one."""
    (folder / "server.log").touch()
    with text_server(checkpoint, max_batch_size) as server:
        yield server.url


@pytest.fixture
def short(monkeypatch):
    """The flags of a short run with few questions."""
    monkeypatch.setattr(soak_server, "served", _served_here)
    monkeypatch.setattr(serve_requests, "NUM_DISTINCT", 12)
    monkeypatch.setattr(soak_server, "JUDGED_S", float("inf"))
    monkeypatch.setattr(soak_hostile, "PATIENCE_S", 120.0)
    monkeypatch.setattr(soak_hostile, "_NO_HTTP_S", 0.2)
    # Of a machine that others use as well.
    monkeypatch.setattr(soak_connections, "HEALTH_S", 60.0)
    words = "soak --requests 60 --clients 6 --seconds 3 --think 0.1 --connections 30 --hold 3"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--kills", "2", "--steps", "9"])
    return soak.parse()


def assert_kept(report: PartResult) -> None:
    broken = [one for one in report.promises if one.holds is False]
    assert broken == []


def test_hostile_requests(short, tmp_path):
    report = soak_hostile.run_hostile(short, tmp_path)
    assert_kept(report)
    assert sum(report.figures["kinds"].values()) == 60
    assert report.figures["good"] == 6
    assert len(report.figures["statuses"]) > 2


def test_clients(short, tmp_path):
    report = soak_clients.run_clients(short, tmp_path)
    assert_kept(report)
    assert report.figures["requests"] > 0
    assert report.figures["answer_p50_s"] <= report.figures["answer_p99_s"]


def test_connections(short, tmp_path):
    report = soak_connections.run_connections(short, tmp_path)
    assert_kept(report)
    assert set(report.figures["opened"]) == set(soak_connections.KINDS)
    assert report.figures["health_missed"] == 0


@pytest.mark.timeout(900)
def test_kills(short, tmp_path, ranks, monkeypatch):
    class SharedRanks:
        def __enter__(self):
            return ranks

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(soak_kills, "WarmRanks", SharedRanks)
    report = soak_kills.run_kills(short, tmp_path)
    assert_kept(report)
    assert sum(report.figures["victims"].values()) == 2
    assert report.figures["finished_trainings"] >= 1


def test_a_broken_promise_is_the_status_and_in_the_record(tmp_path, monkeypatch, capsys):
    def run(args: argparse.Namespace, folder: Path) -> PartResult:
        assert folder.is_dir()
        report = PartResult("kills", {"kills": 3})
        report.promise("all is well", "nothing is", False)
        report.promise("memory does not grow", "too short", None)
        return report

    monkeypatch.setitem(soak.PARTS, "kills", run)
    record = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["soak", "--parts", "kills", "--json", str(record)])
    assert soak.main() == 1
    printed = capsys.readouterr().out
    assert "all is well           nothing is  BROKEN" in printed
    assert "memory does not grow  too short   not judged" in printed
    part = json.loads(record.read_text())["details"]["parts"]["kills"]
    assert part["kills"] == 3
    assert [one["verdict"] for one in part["promises"]] == ["BROKEN", "not judged"]


@pytest.mark.parametrize("samples", [0, 1, 2, 4])
def test_memory_of_a_short_load(samples):
    memory = serve_process.Memory(psutil.Process())
    memory.samples += [(0.5 * n, 100.0) for n in range(samples)]
    memory.threads += [5] * samples
    memory.descriptors += [7] * samples
    figures = memory.figures()
    assert len(memory.samples) == max(samples, 3)
    if samples == 4:
        assert figures["memory_growth"] == 0
        assert figures["threads_last"] == 5
    else:
        assert figures["memory_last_mib"] > 0


def test_values_out_of_range_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "--kills", "0"])
    with pytest.raises(SystemExit):
        soak.parse()
    assert "--kills 0 is out of range, allowed: 1 or more" in capsys.readouterr().err
