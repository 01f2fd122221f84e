"""The training stage: the flags of the demo's model, and one line of progress at a time."""

import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from examples.budget import Trial
from examples.stages import follow_training
from megatron.early_exit.hardware.dtypes import best_training_dtype

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
    --micro-batch-size 4 --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
"""
STAGES = 2
TRIAL_STEPS = 6
PARALLELISM = f"--pipeline-model-parallel-size {STAGES}"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Where a run reads and writes, and how long it is.

    Attributes:
        train_data, validation_data: prefixes of indexed data sets.
        tokenizer_model: SentencePiece model.
        directory: gets `checkpoint/`, `tensorboard/` and `log.txt`.
        length: the flag of the demo that determines how long it is.
        global_batch_size: samples in a step.
        dtype: torch.bfloat16 or torch.float32.
    """

    train_data: Path
    validation_data: Path
    tokenizer_model: Path
    directory: Path
    length: str
    global_batch_size: int
    dtype: torch.dtype

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
        """Whether a run with the same flags has finished before."""
        return self._made.exists() and self._made.read_text() == self._recipe()

    @property
    def _made(self) -> Path:
        return self.directory / "command.txt"

    def _recipe(self) -> str:
        return f"{shlex.join(self._flags())} # {self.length}"

    def mark_finished(self) -> None:
        """Remember the run for `is_finished`."""
        self._made.write_text(self._recipe())

    def steps_done(self) -> int:
        """The iteration of the checkpoint that was saved last."""
        return int((self.checkpoint / "latest_checkpointed_iteration.txt").read_text())

    def _flags(self) -> list[str]:
        """All flags except the paths of the output and the number of steps."""
        return [
            *f"{MODEL} {OPTIMIZATION} {PARALLELISM}".split(),
            *(["--bf16"] if self.dtype == torch.bfloat16 else []),
            *("--global-batch-size", str(self.global_batch_size)),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer_model)),
            *("--train-data-path", str(self.train_data)),
            *("--valid-data-path", str(self.validation_data)),
            *("--test-data-path", str(self.validation_data)),
        ]

    def command(self, steps: int, log_interval: int = 10) -> list[str]:
        """The command line, ready to be run by hand from the repository's root.

        Args:
            steps: optimizer steps; the learning rate rises during the first of them, and reaches
                its least value at the last.
            log_interval: steps from one line of the log to the next.
        """
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(STAGES), "pretrain_early_exit_gpt.py", *self._flags()),
            *("--train-iters", str(steps), "--lr-warmup-iters", str(max(1, steps // 20))),
            *("--eval-interval", str(steps), "--eval-iters", "2"),
            *("--log-interval", str(log_interval)),
            *("--save", str(self.checkpoint), "--save-interval", str(steps)),
            *("--tensorboard-dir", str(self.tensorboard)),
        ]


def training_dtype() -> torch.dtype:
    """Return the number format that is fast on the device that the stages run on.

    Raises:
        ValueError: the environment variable that lists the fast formats has an unknown value.
    """
    return best_training_dtype("cuda" if torch.cuda.device_count() >= STAGES else "cpu")


def trial(run: TrainingRun) -> Trial:
    """Time a few steps of a run, and delete their output.

    Raises:
        SystemExit: the training failed; the end of its log is printed.
    """
    start = time.monotonic()
    short = replace(run, directory=run.directory.with_name("trial"))
    log = _follow(short, short.command(TRIAL_STEPS, log_interval=1))
    found = Trial.of(log.read_text(), time.monotonic() - start)
    shutil.rmtree(short.directory)
    return found


def train(run: TrainingRun, steps: int, minutes: int | None = None) -> None:
    """Train from the start, after deleting the output of an earlier run; print a line of
    progress now and then; keep the whole log.

    Args:
        run: the run.
        steps: optimizer steps.
        minutes: time limit, after which the run saves the step that it has reached and ends.

    Raises:
        SystemExit: the training failed; the end of its log is printed.
    """
    guard = [] if minutes is None else ["--exit-duration-in-mins", str(minutes)]
    _follow(run, [*run.command(steps), *guard])
    if (done := run.steps_done()) < steps:
        print(
            f"   The machine became slower: training ended after {done} of {steps} steps, before "
            "the learning rate had reached its least value."
        )
    run.mark_finished()


def _follow(run: TrainingRun, command: list[str]) -> Path:
    """Run a training command from the start; returns its log."""
    shutil.rmtree(run.directory, ignore_errors=True)
    run.directory.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if 0 < torch.cuda.device_count() < STAGES:
        print(f"   this machine has fewer GPUs than the {STAGES} stages: they run on its CPU")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = run.directory / "log.txt"
    follow_training(command, log, environment)
    return log
