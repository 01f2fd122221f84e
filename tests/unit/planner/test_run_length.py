"""How long runs take where machines fail: the best interval between checkpoints, and the time."""

import random

import pytest

from megatron.early_exit.planner.search.run_length import (
    MTBF_HOURS,
    Reliability,
    run_length,
)

HOUR_S = 3600


def test_llama_3_failed_every_three_hours():
    assert Reliability().mtbf_s(16_384) / HOUR_S == pytest.approx(54 * 24 / 419)
    assert pytest.approx(50_677, abs=1) == MTBF_HOURS


def test_the_first_term_is_youngs():
    one = Reliability(mtbf_hours=1e6, checkpoint_s=1)
    young = (2 * one.mtbf_s(1)) ** 0.5
    assert one.best_interval_s(1) == pytest.approx(young, rel=1e-3)


@pytest.mark.parametrize(("mtbf_hours", "checkpoint_s"), [(1, 60), (20, 300), (0.5, 600)])
def test_no_other_interval_is_better(mtbf_hours, checkpoint_s):
    reliability = Reliability(mtbf_hours=mtbf_hours, checkpoint_s=checkpoint_s)
    best = run_length(100_000, 1.0, 1, reliability)
    for factor in (0.7, 0.85, 1.15, 1.4):
        step_s = best.save_interval * factor
        # One step is an interval, so that there is no other.
        other = run_length(round(100_000 / step_s), step_s, 1, reliability)
        assert other.save_interval == 1
        assert other.total_s / other.training_s > best.total_s / best.training_s


def test_the_expected_time_is_that_of_many_runs():
    reliability = Reliability(mtbf_hours=0.5, checkpoint_s=60, restart_s=120)
    expected = run_length(2000, 10.0, 1, reliability)
    mtbf_s, draw = reliability.mtbf_s(1), random.Random(7)
    attempt_s = expected.save_interval * 10.0 + 60
    num_runs = 400
    total_s = failures = 0.0
    for _ in range(num_runs * round(2000 / expected.save_interval)):
        needed_s = attempt_s
        while (fails_s := draw.expovariate(1 / mtbf_s)) < needed_s:
            total_s += fails_s
            failures += 1
            # It fails while it restarts, too, and has the interval before itself again.
            needed_s = 120 + attempt_s
        total_s += needed_s
    assert total_s / num_runs == pytest.approx(expected.total_s, rel=0.02)
    assert failures / num_runs == pytest.approx(expected.num_failures, rel=0.03)


def test_parts_are_the_whole():
    one = run_length(1000, 20.0, 4096, Reliability())
    assert one.training_s == 20_000
    assert one.checkpoints_s == pytest.approx(60 * 1000 / one.save_interval)
    assert 0 < one.failures_s < one.training_s
    # A short run that hardly fails is saved at its end.
    assert run_length(10, 1.0, 1, Reliability()).save_interval == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mtbf_hours": 0}, "--mtbf-hours 0 is out of range, allowed: above 0"),
        ({"mtbf_hours": 1e308}, r"--mtbf-hours 1e\+308 is out of range, allowed: above 0, up to"),
        ({"checkpoint_s": 1e13}, "--checkpoint-seconds 10000000000000.0 is out of range"),
        ({"checkpoint_s": 0}, "--checkpoint-seconds 0 is out of range, allowed: above 0"),
        ({"restart_s": -1}, "--restart-seconds -1 is out of range, allowed: 0 to 1"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Reliability(**values)


@pytest.mark.parametrize(
    ("step_s", "others", "allowed"),
    [
        (90.0, {}, "7.5 s or more, with 90 s of steps from one checkpoint to the next"),
        (60.0, {"checkpoint_s": 240}, "15 s or more, with --checkpoint-seconds 240"),
        (60.0, {"restart_s": 5000}, "250 s or more, with --restart-seconds 5000"),
    ],
)
def test_runs_that_hardly_end_are_refused(step_s, others, allowed):
    given = {"checkpoint_s": 60, "restart_s": 0} | others
    message = f"--mtbf-hours 0.01 is a failure each 0.36 s with 100 GPUs, allowed: {allowed}"
    with pytest.raises(ValueError, match=message):
        run_length(10, step_s, 100, Reliability(mtbf_hours=0.01, **given))
