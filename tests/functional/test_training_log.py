"""What a training run with exits tells: console, TensorBoard, W&B, progress, and its refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    LAYERS,
    SCHEDULE,
    TOKENIZER,
    Run,
    train,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STEPS = 5
EXITS = (1, 3)
KEYS = ["lm loss", *(f"exit {n} {what}" for n in EXITS for what in ("loss", "accuracy", "weight"))]
# Megatron's own.
KEYS += ["mtp_1 loss", "mtp_2 loss"]


@pytest.fixture(scope="module")
def run(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two stages with an exit each; evaluation in smaller microbatches than training."""
    folder = tmp_path_factory.mktemp("log")
    flags = [
        *write_documents(folder),
        *("--pipeline-model-parallel-size", 2, "--train-iters", STEPS, "--mtp-num-layers", 2),
        *("--exit-layer-nums", *EXITS, "--exit-layer-weight", 0.4, 0.2),
        *("--exit-layer-weight-init", 0.0, 1.0, "--exit-layer-weight-warmup-iters", 4),
        *("--eval-interval", 4, "--eval-iters", 2, "--eval-micro-batch-size", 1),
        *("--wandb-project", "exits", "--wandb-exp-name", "test", "--wandb-save-dir", folder),
    ]
    return train(ranks, folder / "run", 2, flags, env={"WANDB_MODE": "offline"})


def console_figures(run: Run) -> list[dict[str, float]]:
    """The figures of each iteration's line."""
    lines = [line for line in run.output.splitlines() if re.search(r"\] iteration +\d+/", line)]
    return [
        {name: float(value) for name, value in re.findall(r"\| ([\w ()]+): +([-\d.E+]+)", line)}
        for line in lines
    ]


def test_console_and_tensorboard_show_every_exit_at_every_iteration(run: Run):
    figures = console_figures(run)
    assert len(figures) == STEPS
    for key in KEYS:
        assert run.steps[key] == list(range(1, STEPS + 1))
        first, second, *others = run.scalars[key]
        # Megatron's console takes the first iteration into the second one's mean.
        expected = [first, (first + second) / 2, *others]
        assert [step[key] for step in figures] == pytest.approx(expected, rel=1e-5)


def test_figures_make_sense(run: Run):
    for position in EXITS:
        assert all(3 < loss < 5 for loss in run.scalars[f"exit {position} loss"])
        assert all(0 <= share <= 1 for share in run.scalars[f"exit {position} accuracy"])
    # A log that took one head's figures for another's would not show this.
    assert run.scalars["exit 1 loss"] != run.scalars["exit 3 loss"] != run.scalars["lm loss"]


def test_weights_warm_up_and_cool_down(run: Run):
    assert run.scalars["exit 1 weight"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert run.scalars["exit 3 weight"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_validation_shows_every_exit(run: Run):
    (line,) = [line for line in run.output.splitlines() if "validation loss at iteration 4" in line]
    for name in ("lm loss", "exit 1 loss", "exit 3 loss"):
        value = run.scalars[f"{name} validation"][0]
        assert run.steps[f"{name} validation"][0] == 4
        assert f"{name} value: {value:.6E}" in line
        # After the update of iteration 4: between what iterations 4 and 5 saw, or near.
        assert value == pytest.approx(run.scalars[name][3], rel=0.05)
    (line,) = [line for line in run.output.splitlines() if "validation at iteration 4" in line]
    for position in EXITS:
        value = run.scalars[f"exit {position} accuracy validation"][0]
        assert f"exit {position} accuracy: {value:.4f}" in line
    assert "accuracy PPL" not in run.output


def test_progress_shows_speed_and_time_left(run: Run):
    lines = re.findall(
        r"progress: +(\d+)% \((\d+)/5\) \| ([\d,]+) tokens/s \| time left (\d+:\d\d:\d\d)",
        run.output,
    )
    assert [(int(share), int(step)) for share, step, _, _ in lines] == [
        (100 * step // STEPS, step) for step in range(2, STEPS + 1)
    ]
    assert lines[-1][3] == "0:00:00"
    assert all(int(tokens.replace(",", "")) > 0 for _, _, tokens, _ in lines)


def test_wandb_gets_every_figure(run: Run):
    (log,) = run.folder.parent.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    for key in (*KEYS, "exit 1 loss validation", "exit 3 accuracy validation"):
        assert key.encode() in written


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--exit-layer-nums", 1, 9], ["--exit-layer-nums 9", f"1 to {LAYERS}"]),
        (
            ["--exit-layer-nums", 1, "--pre-exit"],
            ["--exit-layer-nums 1", "2 to the number of layers"],
        ),
        (["--exit-layer-nums", 2, 2], ["--exit-layer-nums 2 2", "more than once"]),
        (
            ["--exit-layer-nums", 1, 2, "--exit-layer-weight", 0.5],
            ["--exit-layer-weight 0.5", "2 layers"],
        ),
        (
            ["--exit-layer-nums", 2, "--use-exit-mlp", "--pre-exit"],
            ["--use-exit-mlp cannot be combined with --pre-exit"],
        ),
        (
            ["--exit-layer-nums", 2, "--exit-loss-chunk-tokens", 0],
            ["--exit-loss-chunk-tokens 0", "1 or more"],
        ),
        (["--exit-layer-nums", "two"], ["--exit-layer-nums", "'two'"]),
        (["--exit-layer-weight-warmup-style", "square"], ["--exit-layer-weight-warmup-style"]),
        (
            ["--exit-layer-nums", 2, "--num-experts", 2, "--use-exit-block"],
            ["--use-exit-block", "--num-experts 2"],
        ),
        (
            ["--lr-warmup-iters", 3, "--lr-decay-iters", 3],
            ["--lr-warmup-iters 3", "0 to less than 3 (--lr-decay-iters)"],
        ),
        (["--tokenizer-type", "SentencePieceTokenizer"], ["--tokenizer-model is required"]),
        (
            ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "/no/such"],
            ["--tokenizer-model /no/such", "cannot be set up"],
        ),
        (["--softmax-type", "off-by-one"], ["--softmax-type off-by-one"]),
        (["--use-exit-norm"], ["--use-exit-norm has no effect without --exit-layer-nums"]),
        (
            ["--rampup-batch-size", 2, 2, 8],
            ["--rampup-batch-size 2 2 8 is not supported", "--step-batch-size-schedule"],
        ),
        (["--moe-router-topk", 1], ["--moe-router-topk 1 has no effect without --num-experts"]),
        (["--min-lr", 1], ["args.min_lr <= args.lr"]),
        (
            ["--exit-layer-nums", 2, "--mtp-num-layers", 1, "--exit-propagate-prob", 0.5],
            ["--mtp-num-layers 1 cannot be combined with --exit-propagate-prob"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value[0], str) else None,
)
def test_refusal_is_one_sentence_on_rank_0(ranks: WarmRanks, tmp_path: Path, flags, words):
    command = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, "--mock-data", "--train-iters", 1, *flags]
    done = ranks.run(list(map(str, command)), 2, tmp_path)
    assert done.returncode == 2
    first, second = done.stdout.split("[rank1]")
    errors = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert "error: " not in second
    assert "Traceback" not in done.stdout


def test_a_schedule_of_batch_sizes_is_refused_by_its_own_name(ranks: WarmRanks, tmp_path: Path):
    place = SCHEDULE.index("--global-batch-size")
    schedule = [*SCHEDULE[:place], *SCHEDULE[place + 2 :], "--step-batch-size-schedule", "abc"]
    command = [ENTRY, *BACKBONE, *TOKENIZER, *schedule, "--mock-data", "--train-iters", 1]
    done = ranks.run(list(map(str, command)), 1, tmp_path)
    assert done.returncode == 2
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: --step-batch-size-schedule 'abc' cannot be understood")
    assert "tokenizer" not in error
