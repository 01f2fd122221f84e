"""The line of progress, by a clock that the test sets."""

from types import SimpleNamespace

import pytest

from megatron.early_exit.training.loop import progress
from megatron.early_exit.training.loop.progress import Progress


@pytest.fixture
def lines(monkeypatch):
    printed = []
    monkeypatch.setattr(progress, "print_rank_last", printed.append)
    return printed


def report(monkeypatch, shown, times):
    """Report iterations that end at these times."""
    for iteration, now in times.items():
        monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
        shown.report(iteration)


def test_speed_and_time_left_are_those_since_the_last_line(monkeypatch, lines):
    shown = Progress(iterations=10, interval=2, tokens_per_iteration=lambda: 300)
    report(monkeypatch, shown, {1: 100.0, 2: 100.5, 3: 101.0, 4: 102.5})
    assert lines == [
        " progress:  20% (2/10) | 600 tokens/s | time left 0:00:04",
        " progress:  40% (4/10) | 300 tokens/s | time left 0:00:06",
    ]


def test_the_first_iteration_does_not_count(monkeypatch, lines):
    shown = Progress(iterations=5, interval=1, tokens_per_iteration=lambda: 10)
    report(monkeypatch, shown, {1: 60.0, 2: 61.0})
    assert lines == [" progress:  40% (2/5) | 10 tokens/s | time left 0:00:03"]


def test_a_run_goes_on_where_it_was(monkeypatch, lines):
    shown = Progress(iterations=100, interval=10, tokens_per_iteration=lambda: 50)
    report(monkeypatch, shown, {95: 5.0, 100: 10.0})
    assert lines == [" progress: 100% (100/100) | 50 tokens/s | time left 0:00:00"]


def test_events_are_on_the_disk_before_each_checkpoint(monkeypatch, lines):
    written = []
    writer = SimpleNamespace(flush=lambda: written.append(shown))
    shown = Progress(9, 1, lambda: 50, writer=writer, save_intervals=(2, 5))
    counts = []
    for iteration in range(1, 7):
        shown.report(iteration)
        counts.append(len(written))
    assert counts == [0, 1, 1, 2, 3, 4]
    # Ranks without a writer have nothing to write.
    Progress(9, 1, lambda: 50, save_intervals=(1,)).report(1)
