"""The training stage: the flags of the demo's model, and one line of progress at a time."""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.stages import follow_training

EXIT_LAYERS = (2, 4)
NUM_LAYERS = 8

MODEL = f"""
    --num-layers {NUM_LAYERS} --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 3
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0
    --exit-layer-nums {" ".join(map(str, EXIT_LAYERS))} --exit-layer-weight 0.3 0.3 --use-exit-norm
"""
OPTIMIZATION = """
    --bf16 --micro-batch-size 4 --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
"""
STAGES = 2
PARALLELISM = f"--pipeline-model-parallel-size {STAGES}"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Where a run reads and writes, and how long it is.

    Attributes:
        train_data, validation_data: prefixes of indexed data sets.
        tokenizer_model: SentencePiece model.
        directory: gets `checkpoint/`, `tensorboard/` and `log.txt`.
        iterations: optimizer steps.
        global_batch_size: samples in a step.
    """

    train_data: Path
    validation_data: Path
    tokenizer_model: Path
    directory: Path
    iterations: int
    global_batch_size: int

    @property
    def checkpoint(self) -> Path:
        """The directory that the model is saved in."""
        return self.directory / "checkpoint"

    @property
    def tensorboard(self) -> Path:
        """The directory of the event files."""
        return self.directory / "tensorboard"

    @property
    def is_finished(self) -> bool:
        """Whether this very run has been made before."""
        return self._made.exists() and self._made.read_text() == shlex.join(self.command())

    @property
    def _made(self) -> Path:
        return self.directory / "command.txt"

    def mark_finished(self) -> None:
        """Remember the run for `is_finished`."""
        self._made.write_text(shlex.join(self.command()))

    def command(self) -> list[str]:
        """The command line, ready to be run by hand from the repository's root."""
        data = [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer_model)),
            *("--train-data-path", str(self.train_data)),
            *("--valid-data-path", str(self.validation_data)),
            *("--test-data-path", str(self.validation_data)),
        ]
        schedule = [
            *("--train-iters", str(self.iterations)),
            *("--global-batch-size", str(self.global_batch_size)),
            *("--lr-warmup-iters", str(max(1, self.iterations // 20))),
            *("--eval-interval", str(self.iterations), "--eval-iters", "4"),
            *("--log-interval", "10"),
            *("--save", str(self.checkpoint), "--save-interval", str(self.iterations)),
            *("--tensorboard-dir", str(self.tensorboard)),
        ]
        flags = f"{MODEL} {OPTIMIZATION} {PARALLELISM}".split()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [
            *launcher,
            *("--nproc-per-node", str(STAGES), "pretrain_early_exit_gpt.py"),
            *flags,
            *data,
            *schedule,
        ]


def train(run: TrainingRun) -> None:
    """Train from the start (what an earlier run left in its directory goes); print a line of
    progress now and then; keep the whole log.

    Raises:
        SystemExit: the training failed; the end of its log is printed.
    """
    shutil.rmtree(run.directory, ignore_errors=True)
    run.directory.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if 0 < torch.cuda.device_count() < STAGES:
        print(f"   this machine has fewer GPUs than the {STAGES} stages: they run on its CPU")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    follow_training(run.command(), run.directory / "log.txt", environment)
    run.mark_finished()
