"""Megatron's own GPT trains on this machine in every layout, and always with the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.warm_ranks import WarmRanks

SCRIPT = Path(__file__).parent / "stock_gpt.py"
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --group-query-attention --num-query-groups 2 --hidden-dropout 0 "
    "--attention-dropout 0 --untie-embeddings-and-output-weights --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --lr-decay-iters 20 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 --seed 1 --num-workers 0 "
    "--ckpt-format torch_dist"
)
WEIGHTS_ONLY = ["--finetune", "--no-load-optim", "--no-load-rng"]
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


class Trainer:
    """Runs the script with the flags of the tiny model and more."""

    def __init__(self, ranks: WarmRanks, folder: Path) -> None:
        self.ranks = ranks
        self.folder = folder
        self.runs = 0

    def train(self, nproc: int, *flags: object, iters: int = 3) -> list[float]:
        """The losses that were printed, one an iteration.

        (The second number of a run is the mean of the first two iterations, as Megatron prints
        the first one in between its regular reports.)"""
        output = self.run(nproc, *flags, iters=iters)
        losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
        assert losses, output[-6000:]
        return losses

    def run(self, nproc: int, *flags: object, iters: int) -> str:
        """The output of all ranks."""
        self.runs += 1
        arguments = " ".join([MODEL, f"--train-iters {iters}", *map(str, flags)]).split()
        done = self.ranks.run([SCRIPT, *arguments], nproc, self.folder / f"run{self.runs}")
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def trainer(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(ranks, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def checkpoint(trainer: Trainer) -> Path:
    path = trainer.folder / "checkpoint"
    trainer.train(1, "--save", path, "--save-interval", 2, iters=2)
    return path


@pytest.fixture(scope="module")
def one_process(trainer: Trainer, checkpoint: Path) -> list[float]:
    return trainer.train(1, "--load", checkpoint, *WEIGHTS_ONLY)


@pytest.mark.parametrize(
    ("nproc", "flags"),
    [
        (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
        (2, "--tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
        (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
)
def test_layouts_train_alike(
    trainer: Trainer, checkpoint: Path, one_process: list[float], nproc: int, flags: str
) -> None:
    losses = trainer.train(nproc, "--load", checkpoint, *WEIGHTS_ONLY, flags)
    assert losses == pytest.approx(one_process, rel=1e-5)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 4096"])
def test_half_precision_trains_like_single(
    trainer: Trainer, checkpoint: Path, one_process: list[float], precision: str
) -> None:
    losses = trainer.train(1, "--load", checkpoint, *WEIGHTS_ONLY, precision)
    assert losses != one_process
    assert losses == pytest.approx(one_process, rel=1e-3)


def test_the_dynamic_loss_scale_adapts(trainer: Trainer) -> None:
    output = trainer.run(1, "--fp16 --initial-loss-scale 1e38 --hysteresis 1", iters=3)
    scales = [float(scale) for scale in re.findall(r"loss scale: (\S+)", output)]
    assert scales == pytest.approx([5e37, 2.5e37, 1.25e37])


def test_experts_train_alike_in_parallel(trainer: Trainer) -> None:
    path = trainer.folder / "experts"
    trainer.train(1, EXPERTS, "--save", path, "--save-interval", 1, iters=1)
    load = [EXPERTS, "--load", path, *WEIGHTS_ONLY]
    one = trainer.train(1, *load)
    assert trainer.train(2, *load, "--expert-model-parallel-size 2") == pytest.approx(one, rel=1e-5)
    both = "--tensor-model-parallel-size 2 --sequence-parallel"
    assert trainer.train(2, *load, both) == pytest.approx(one, rel=1e-5)


def test_the_optimizer_resumes_in_another_layout(trainer: Trainer) -> None:
    path = trainer.folder / "resumed"
    save = [DISTRIBUTED_OPTIMIZER, "--save", path, "--save-interval", 3]
    pipeline = trainer.train(2, "--pipeline-model-parallel-size 2", *save, iters=6)
    (path / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = trainer.train(2, DISTRIBUTED_OPTIMIZER, "--load", path, iters=6)
    assert pipeline[5] < pipeline[0]
    assert len(resumed) == 3
    assert resumed[0] == pytest.approx(pipeline[3], rel=1e-6)
    assert resumed[2] == pytest.approx(pipeline[5], rel=1e-5)


def test_start_up_is_one_line_without_warnings(trainer: Trainer) -> None:
    output = trainer.run(1, "--data-cache-path", trainer.folder / "cache", iters=1)
    assert output.count("platform: ") == 1
    assert not re.findall(r"^.*warning.*$", output, re.IGNORECASE | re.MULTILINE)
