"""The examples' time: steps and measurements by made-up speeds of machines."""

from __future__ import annotations

import math
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples import budget
from examples.budget import LEAST_PROMPTS, Budget, Measuring, Trial, guard_minutes, thinned
from examples.ee_tuning.smollm2.tuning import Tuning
from examples.quickstart import run as quickstart
from examples.quickstart import tradeoff, training
from examples.quickstart.run import LEAST_STEPS, MEASURED, MOST_STEPS, train_within
from examples.quickstart.training import TrainingRun

# Seconds of a step, those of a run beside its steps, and of a token with both engines together.
SLOW, FAST, OVERLOADED = (1.35, 35.0, 1 / 40), (0.16, 12.0, 1 / 550), (40.0, 200.0, 2.0)


def log_of(*milliseconds: float) -> str:
    return "\n".join(
        f" [2026-01-01] iteration {n}/ 6 | elapsed time per iteration (ms): {ms} | lm loss: 1.0"
        for n, ms in enumerate(milliseconds, 1)
    )


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- training --------------------------------------------------------------------------------


def test_a_trial_tells_the_typical_step_and_what_is_beside_the_steps() -> None:
    # The first step pays for allocations, and something disturbed one of the others.
    trial = Trial.of(log_of(4000, 1300, 1400, 9000, 1350, 1350), wall_seconds=50)
    assert trial == Trial(1.35, 50 - 18.4)
    assert Trial.of(log_of(500), wall_seconds=0.1) == Trial(0.5, 0.0)
    with pytest.raises(ValueError, match="no step times"):
        Trial.of("nothing", 1)


@pytest.mark.parametrize(
    ("machine", "steps"), [(SLOW, 184), (FAST, MOST_STEPS), (OVERLOADED, LEAST_STEPS)]
)
def test_steps_fit_into_the_time_of_any_machine(machine, steps) -> None:
    step, other, _ = machine
    trial = Trial(step, other)
    found = trial.steps_within(315, LEAST_STEPS, MOST_STEPS)
    assert found == steps
    if found > LEAST_STEPS:
        assert found * step + other <= 315


def test_the_budget_leaves_time_to_measure() -> None:
    clock = Clock()
    ten = Budget(600, start=clock.now, clock=clock)
    assert ten.left_for_training() == 360
    # Before training is measured: at most a third of the whole.
    assert ten.left_for_measuring() == 200
    clock.now += 100
    assert ten.left_for_training() == 260
    clock.now += 400
    assert (ten.left_for_training(), ten.left_for_measuring()) == (0, 100)
    clock.now += 400
    assert ten.left_for_measuring() == 0


def test_the_guard_is_behind_the_planned_end() -> None:
    assert [guard_minutes(seconds) for seconds in (0, 59, 60, 61, 315)] == [1, 1, 1, 2, 6]


@pytest.fixture
def demo_run(tmp_path: Path) -> TrainingRun:
    return TrainingRun(
        train_data=tmp_path / "train",
        validation_data=tmp_path / "validation",
        tokenizer_model=tmp_path / "tokenizer.model",
        directory=tmp_path / "run",
        length="--minutes 10",
        global_batch_size=16,
        dtype=torch.float32,
    )


def flags_of(command: list[str]) -> dict[str, str]:
    return dict(pairwise(command))


def test_the_learning_rate_follows_the_number_of_steps(demo_run) -> None:
    for steps in (2, 150, 1200):
        flags = flags_of(demo_run.command(steps))
        assert flags["--train-iters"] == flags["--save-interval"] == str(steps)
        assert flags["--lr-warmup-iters"] == str(max(1, steps // 20))
        assert flags["--lr-decay-style"] == "cosine"
        assert "--lr-decay-iters" not in flags  # Megatron's default is --train-iters


def test_the_dtype_is_the_machines(demo_run, monkeypatch) -> None:
    assert "--bf16" not in demo_run.command(2)
    monkeypatch.setenv("EARLY_EXIT_FAST_DTYPES", "bf16")
    fast = training.replace(demo_run, dtype=training.training_dtype())
    assert "--bf16" in fast.command(2)
    folder = demo_run.directory
    for dtype in (torch.float32, torch.bfloat16):
        tuning = Tuning(base=folder, data=folder, directory=folder, dtype=dtype)
        assert ("--bf16" in tuning.command(8)) is (dtype == torch.bfloat16)


def test_training_within_a_time_follows_a_trial_and_is_guarded(
    demo_run, monkeypatch, capsys
) -> None:
    clock, commands = Clock(), []

    def follow(command, log, environment) -> None:
        commands.append(command)
        steps = int(flags_of(command)["--train-iters"])
        seconds = 30 + 1.5 * steps
        clock.now += seconds
        log.write_text(log_of(*[1500.0] * steps))
        saved = log.parent / "checkpoint"
        saved.mkdir()
        done = steps if len(commands) < 3 else steps - 5
        (saved / "latest_checkpointed_iteration.txt").write_text(str(done))

    monkeypatch.setattr(training, "follow_training", follow)
    monkeypatch.setattr(training.time, "monotonic", clock)
    ten = Budget(600, start=clock.now, clock=clock)
    train_within(demo_run, ten)
    trial, whole = map(flags_of, commands)
    assert trial["--train-iters"] == str(training.TRIAL_STEPS)
    assert trial["--log-interval"] == "1"
    assert Path(trial["--save"]).parent.name == "trial"
    assert not Path(trial["--save"]).parent.exists()
    # 360 seconds but 39 for the trial; a tenth of them is left, and 30 go to the start and the end.
    assert whole["--train-iters"] == str(int((0.9 * 321 - 30) / 1.5))
    assert whole["--exit-duration-in-mins"] == "6"
    assert clock.now <= ten.start + 360
    assert demo_run.is_finished
    assert "172 steps of 1.50 s in fp32: 5.3 minutes are left" in capsys.readouterr().out
    assert not training.replace(demo_run, length="--minutes 5").is_finished
    # One that the guard ended says so.
    training.train(demo_run, 100, 6)
    assert "training ended after 95 of 100 steps" in capsys.readouterr().out


# --- measuring -------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [SLOW, FAST])
def test_measuring_fits_into_a_third_of_the_time(machine) -> None:
    _, _, token = machine
    part = MEASURED.within(200, token)
    assert part.seconds(token) <= 200
    assert (part == MEASURED) is (machine is FAST)


def test_an_honest_table_keeps_its_least() -> None:
    part = MEASURED.within(0, OVERLOADED[2])
    assert part == Measuring(
        prompts=LEAST_PROMPTS, tokens=44, repeats=2, thresholds=(0.9, 0.2, 0.15, 0.1, 0.05, 0.0)
    )
    tiny = Measuring(prompts=1, tokens=2, repeats=2, thresholds=(0.5,))
    assert tiny.within(0, 1) == tiny


def test_less_time_never_measures_more() -> None:
    parts = [MEASURED.within(seconds, 0.01) for seconds in range(300, 0, -1)]
    costs = [part.seconds(0.01) for part in parts]
    assert costs == sorted(costs, reverse=True)
    assert len(set(parts)) == 5


def test_thinned_thresholds_keep_both_ends() -> None:
    assert thinned((0.9, 0.5, 0.0)) == (0.9, 0.5, 0.0)
    assert thinned(range(10), 4) == (0, 7, 8, 9)


class FakeEngine:
    """Takes a made-up time for a token, and gives always the same one."""

    def __init__(self, clock: Clock, name: str, order: list[tuple[str, str, float | None]]) -> None:
        self.clock, self.name, self.order, self.looked = clock, name, order, 0

    def generate(self, prompt, params):
        if params.max_tokens == 0:
            return [self.scored(*prompt)]
        is_full = params.mode == "full"
        threshold = None if is_full else params.early_exit_threshold
        self.order.append((self.name, prompt, threshold))
        seconds = params.max_tokens * (0.02 if is_full else 0.01)
        self.clock.now += seconds
        statistics = SimpleNamespace(
            decode_seconds=seconds, num_generated_tokens=params.max_tokens + 1
        )
        tokens = [7] * params.max_tokens
        layers = [8 if is_full else 2] * params.max_tokens
        answer = SimpleNamespace(
            prompt_token_ids=[1, 2], token_ids=tokens, exit_layers=layers, statistics=statistics
        )
        return [answer]

    def scored(self, text):
        """Finds the first token of an answer less probable than another one."""
        self.looked += 1
        first = [SimpleNamespace(token_id=1, logprob=None, top_logprobs=())]
        scores = [
            SimpleNamespace(
                token_id=token, logprob=-0.5, top_logprobs=((8 if place == 2 else token, -0.1),)
            )
            for place, token in enumerate(text[1:], start=1)
        ]
        return SimpleNamespace(prompt_tokens=first + scores, error=None)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tradeoff, "monotonic", clock)
    return clock


def fake_curves(clock: Clock) -> tuple[dict[str, tradeoff.Curve], list]:
    order: list[tuple[str, str, float | None]] = []
    names = ("plain", "compiled")
    return {name: tradeoff.Curve(FakeEngine(clock, name, order)) for name in names}, order


def test_settings_take_turns_and_each_text_is_looked_at_once(clock) -> None:
    curves, order = fake_curves(clock)
    most = Measuring(prompts=4, tokens=10, repeats=2, thresholds=(0.5, 0.0))
    points = tradeoff.measure(curves, list("abcd"), most)
    assert [(p.curve, p.threshold) for p in points] == [
        (curve, threshold) for curve in curves for threshold in (None, 0.5, 0.0)
    ]
    assert [p.speedup for p in points] == pytest.approx([1, 2, 2] * 2)
    assert {p.agreement for p in points} == {0.9}
    assert {p.perplexity for p in points} == {math.exp(0.5)}
    turns = order[-len("abcd") * 12 :]
    assert [prompt for _, prompt, _ in turns] == [p for p in "abcd" for _ in range(12)]
    assert [curve.engine.looked for curve in curves.values()] == [1, 1]


def test_measuring_ends_in_time_with_the_same_prompts_for_all(clock, capsys) -> None:
    curves, order = fake_curves(clock)
    start = clock.now
    tradeoff.measure(curves, list("abcdefgh"), MEASURED, 30)
    assert "so only this is measured: 3 prompts, 44 tokens" in capsys.readouterr().out
    prompts = [prompt for _, prompt, _ in order[-3 * 2 * 2 * 7 :]]
    assert {p: prompts.count(p) for p in "abc"} == dict.fromkeys("abc", 28)
    assert clock.now - start < 60


def test_a_machine_that_becomes_slower_ends_between_two_prompts(clock, capsys) -> None:
    curves, order = fake_curves(clock)
    most = Measuring(prompts=8, tokens=10, repeats=2, thresholds=(0.0,))
    part = most.seconds(0.04)

    def slower(prompt, params, generate=curves["plain"].engine.generate):
        clock.now += part / 16
        return generate(prompt, params)

    curves["plain"].engine.generate = slower
    tradeoff.measure(curves, list("abcdefgh"), most, part * 2)
    measured = {prompt for _, prompt, _ in order}
    assert LEAST_PROMPTS <= len(measured) < 8
    assert f"after {len(measured)} prompts: other work slows this" in capsys.readouterr().out


def point(threshold: float | None, speedup: float, agreement: float) -> tradeoff.Point:
    return tradeoff.Point("compiled layers", threshold, 10.0, speedup, 4.0, agreement, 1.0, 5.0)


def test_the_verdict_says_why_nothing_is_gained() -> None:
    full = point(None, 1.0, 1.0)
    gained = tradeoff.verdict([full, point(0.1, 1.2, 0.95), point(0.0, 1.5, 0.8)], 0.9)
    assert "threshold 0.1, 1.20 times" in gained
    assert "\n" not in gained
    slow = tradeoff.verdict([full, point(0.1, 0.9, 0.95), point(0.0, 0.95, 0.5)], 0.9)
    assert "No threshold is faster here" in slow
    rough = tradeoff.verdict([full, point(0.1, 0.9, 0.95), point(0.0, 1.5, 0.8)], 0.9)
    assert "0.0 is 1.50 times as fast with 80.0% agreement, less than 90%" in rough


def test_the_verdict_says_where_a_short_training_makes_every_threshold_good() -> None:
    points = [point(None, 1.0, 1.0), point(0.1, 1.2, 0.99), point(0.0, 2.0, 0.98)]
    found = tradeoff.verdict(points, 0.9)
    assert "threshold 0.0, 2.00 times" in found
    assert "the layers after the first exit improve little on it" in found


# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--minutes 0", "--minutes 0.0 is out of range, allowed: 1 or more"),
        ("--minutes nan", "--minutes nan is out of range, allowed: 1 or more"),
        ("--minutes inf", "--minutes inf is out of range, allowed: 1 or more"),
        ("--steps 1", "--steps 1 is out of range, allowed: 2 or more"),
    ],
)
def test_lengths_out_of_range_are_refused(words, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", *shlex.split(words)])
    with pytest.raises(SystemExit, match="2"):
        quickstart.parse()
    assert message in capsys.readouterr().err


def test_the_variables_of_the_demo(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])
    monkeypatch.setenv("DEMO_STEPS", "12")
    assert quickstart.parse().steps == 12
    monkeypatch.delenv("DEMO_STEPS")
    args = quickstart.parse()
    assert (args.steps, args.minutes, args.dtype) == (None, 10.0, torch.float32)
    assert args.compile
    monkeypatch.setenv("DEMO_COMPILE", "0")
    assert not quickstart.parse().compile
    monkeypatch.setenv("EARLY_EXIT_FAST_DTYPES", "fp64")
    with pytest.raises(SystemExit, match="2"):
        quickstart.parse()
    assert "EARLY_EXIT_FAST_DTYPES=fp64: 'fp64' is unknown" in capsys.readouterr().err


def test_shares_of_the_budget_leave_time_to_load() -> None:
    assert budget.TRAINING_ENDS + budget.MEASURING < 0.95
