"""Training by lists: the list of 1F1B does bitwise what Megatron's schedule does, filled bubbles
use every sample once, and a stopped run goes on as if it had not been."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    GLOBAL_BATCH,
    MICROBATCH,
    SCHEDULE,
    TOKENIZER,
    Run,
    train,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STEPS = 6
EXITS = "--exit-layer-nums 1 3 --use-exit-norm"
PP, TP = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
# What is measured differs from run to run.
FILL = "--fill-explicit-bubbles --backward-forward-ratio 2"
MEASURED_FILL = "--fill-explicit-bubbles"
FILLS = "--num-fill-{}-microbatches {}"
GATES = "--use-exit-gate"
NO_FILLS = f"{FILL} {FILLS.format('warmup', 0)} {FILLS.format('cooldown', 0)}"
ONE_EACH = f"{FILL} {FILLS.format('warmup', 1)} {FILLS.format('cooldown', 1)}"


@dataclass
class Trainer:
    ranks: WarmRanks
    folder: Path
    data: list[object]

    def __post_init__(self) -> None:
        self._count = 0

    def train(self, nproc: int, flags: str, steps: int = STEPS) -> Run:
        self._count += 1
        common = [*self.data, *EXITS.split(), "--train-iters", steps, *flags.split()]
        return train(self.ranks, self.folder / str(self._count), nproc, common)


@pytest.fixture(scope="module")
def trainer(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("filling")
    return Trainer(ranks, folder, write_documents(folder))


def figures(run: Run) -> dict[str, list[float]]:
    """All that depends on training, exactly as logged."""
    names = [n for n in run.scalars if n == "grad-norm" or n.endswith((" loss", " accuracy"))]
    gates = sum(n.endswith(" gate AUC") for n in run.scalars)
    assert len(names) == 6 + 2 * gates, names
    return {name: run.scalars[name] for name in names}


def consumed(run: Run) -> list[int]:
    return [int(n) for n in re.findall(r"consumed samples: +(\d+)", run.output)]


LAYOUTS = {
    "pp4": (4, f"{PP} 4 --calculate-per-token-loss"),
    "pp2-dp2-overlap": (
        *(4,),
        f"{PP} 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        f"--ddp-bucket-size 2000 {GATES}",
    ),
    "pp2-fp16-recompute": (
        *(2,),
        f"{PP} 2 --fp16 --initial-loss-scale 1024 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_1f1b_by_its_list_is_megatrons(trainer, layout):
    nproc, flags = LAYOUTS[layout]
    found, expected = (trainer.train(nproc, f"{flags} {more}") for more in (NO_FILLS, ""))
    assert figures(found) == figures(expected)
    assert consumed(found) == consumed(expected)


@pytest.mark.parametrize(
    ("nproc", "flags", "fills"),
    [
        (
            *(4, f"{PP} 2 {ONE_EACH} --use-distributed-optimizer --overlap-grad-reduce {GATES}"),
            4,
        ),
        # Exits on the second and the fourth stage: one of the warm-up's would reach none.
        (4, f"{PP} 4 {FILL} --pre-exit --exit-layer-nums 2 4", 3),
    ],
    ids=["pp2-dp2", "pp4-pre-exit"],
)
def test_extra_samples_are_counted(trainer, nproc, flags, fills):
    run = trainer.train(nproc, flags)
    batch = GLOBAL_BATCH + fills * MICROBATCH
    assert consumed(run) == [batch * step for step in range(1, STEPS + 1)]
    for name, values in figures(run).items():
        # What exits agree on with the final head changes while they learn.
        if name.endswith(" loss") and " gate " not in name:
            assert values[-1] < values[0], name
    assert (GATES in flags) == ("exit 1 gate AUC" in run.scalars)


def test_samples_may_come_from_the_batch(trainer):
    run = trainer.train(4, f"{PP} 4 {FILL} --fill-samples from-batch --global-batch-size 16")
    assert consumed(run) == [16 * step for step in range(1, STEPS + 1)]
    assert "2 microbatches in the warm-up and 2 in the cool-down of 8" in run.output


def test_tensor_parallel_stages_are_filled_alike(trainer, tmp_path):
    exits = "--exit-layer-nums 1 2 4"
    trainer.train(1, f"{exits} --save {tmp_path} --save-interval 1", steps=1)
    flags = f"{PP} 2 {ONE_EACH} {exits} --load {tmp_path} --no-load-optim --no-load-rng"
    one, two = trainer.train(2, flags), trainer.train(4, f"{flags} {TP} 2 --sequence-parallel")
    names = [name for name in one.scalars if name == "grad-norm" or name.endswith(" loss")]
    assert len(names) == 5
    for name in names:
        assert two.scalars[name] == pytest.approx(one.scalars[name], rel=1e-3), name


def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path):
    flags = f"{PP} 4 {FILL} --save {tmp_path} --save-interval 3"
    # As many as fit; the second of the warm-up's still reaches the first stage's exit.
    run = trainer.train(4, flags)
    whole = figures(run)
    assert consumed(run) == [16 * step for step in range(1, STEPS + 1)]
    flags = flags.replace(str(tmp_path), f"{tmp_path}/stopped")
    trainer.train(4, f"{flags} --exit-interval 3")
    rest = trainer.train(4, f"{flags} --load {tmp_path}/stopped")
    assert figures(rest) == {name: values[3:] for name, values in whole.items()}
    assert consumed(rest) == [16 * step for step in range(4, STEPS + 1)]


FILLED = re.compile(
    r"(\d) microbatches in the warm-up and (\d) in the cool-down of (\d), "
    r"a backward takes ([\d.]+) forwards"
)


def test_the_ratio_can_be_measured(trainer, tmp_path):
    flags = f"{PP} 4 {MEASURED_FILL} --save {tmp_path} --save-interval {STEPS}"
    run = trainer.train(4, f"{flags} --exit-interval {STEPS}", steps=STEPS + 1)
    (found,) = FILLED.findall(run.output)
    warmup, cooldown, microbatches = map(int, found[:3])
    ratio = float(found[3])
    # One of each fits with the ratio that extra samples are counted for, and no more are filled.
    assert warmup == cooldown == min(int(3 * ratio / (1 + ratio)), 1)
    assert microbatches == 6
    assert consumed(run) == [12 * step for step in range(1, STEPS + 1)]
    # A run that goes on does not measure anew, which might give another ratio.
    rest = trainer.train(4, f"{flags} --load {tmp_path}", steps=STEPS + 1)
    assert FILLED.findall(rest.output) == [found]
    before, _ = rest.output.split("a backward takes", 1)
    assert "iteration        7/" not in before


@pytest.mark.parametrize(
    ("nproc", "flags", "message"),
    [
        (1, FILL, "--fill-explicit-bubbles has no effect with --pipeline-model-parallel-size 1"),
        (
            2,
            f"{PP} 2 {FILL} --num-layers-per-virtual-pipeline-stage 1",
            "--num-layers-per-virtual-pipeline-stage 1 cannot be combined with "
            "--fill-explicit-bubbles: chunks leave smaller bubbles",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(trainer, tmp_path, nproc, flags, message):
    command = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *trainer.data, *EXITS.split()]
    done = trainer.ranks.run(
        [*map(str, command), "--train-iters", "1", *flags.split()], nproc, tmp_path
    )
    assert done.returncode == 2
    assert message in done.stdout
    assert "Traceback" not in done.stdout
