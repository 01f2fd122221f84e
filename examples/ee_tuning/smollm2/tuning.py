"""The tuning stage: the exits that SmolLM2 gets, and the command that tunes them."""

import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from examples.budget import Trial
from examples.stages import follow_training
from megatron.early_exit.hardware.resources import usable_cores

EXIT_LAYERS = (12, 16, 20)
HEADS = """
    --use-exit-block --use-exit-norm --exit-vocab-size 8192
    --use-exit-gate --exit-measure gate
    --mtp-num-layers 2 --mtp-use-repeated-layer
"""
OBJECTIVE = "--exit-distillation-weight 1"
BATCH, SEQUENCE = 2, 256
"""Sequences of a step, and tokens of each. In the same time many steps with small batches tune
exits better, see the README of the example."""
OPTIMIZATION = f"""
    --micro-batch-size {BATCH} --global-batch-size {BATCH} --seq-length {SEQUENCE}
    --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0
    --clip-grad 1.0
"""
TRIAL_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Where a run reads and writes.

    Attributes:
        base: the imported model.
        data: folder of the indexed data sets.
        directory: gets `checkpoint/`, `tensorboard/` and `log.txt`.
        dtype: torch.bfloat16 or torch.float32.
    """

    base: Path
    data: Path
    directory: Path
    dtype: torch.dtype

    @property
    def checkpoint(self) -> Path:
        """The directory that the exits are saved in."""
        return self.directory / "checkpoint"

    @property
    def is_finished(self) -> bool:
        """Whether there are tuned exits."""
        return (self.checkpoint / "latest_checkpointed_iteration.txt").exists()

    def run(self, steps: int, minutes: int | None = None) -> Path:
        """Tune from the start, after deleting the output of an earlier run. Returns the log.

        Args:
            steps: optimizer steps.
            minutes: time limit, after which the run saves the step that it has reached and ends.

        Raises:
            SystemExit: it failed.
        """
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        log = self.directory / "log.txt"
        threads = os.environ.get("OMP_NUM_THREADS", str(usable_cores()))
        guard = [] if minutes is None else ["--exit-duration-in-mins", str(minutes)]
        follow_training([*self.command(steps), *guard], log, {"OMP_NUM_THREADS": threads})
        return log

    def trial(self) -> Trial:
        """Time a few steps, and delete their output."""
        start = time.monotonic()
        short = replace(self, directory=self.directory.with_name("trial"))
        found = Trial.of(short.run(TRIAL_STEPS).read_text(), time.monotonic() - start)
        shutil.rmtree(short.directory)
        return found

    def command(self, steps: int) -> list[str]:
        """The command line, ready to be run by hand from the repository's root."""
        train, validation = (
            str(self.data / f"{split}_text_document") for split in ("train", "validation")
        )
        text = f"""
            --tune-exit --exit-layer-nums {" ".join(map(str, EXIT_LAYERS))} {HEADS} {OBJECTIVE}
            {OPTIMIZATION} --lr-warmup-iters {max(1, steps // 30)}
            --train-iters {steps} --eval-interval {steps} --eval-iters 4
            --save-interval {steps} --log-interval {min(10, max(1, steps // TRIAL_STEPS))}
            --num-workers 0
        """
        return [
            *(sys.executable, "pretrain_early_exit_gpt.py", *text.split()),
            *(["--bf16"] if self.dtype == torch.bfloat16 else []),
            *("--load", str(self.base), "--use-checkpoint-args"),
            *("--save", str(self.checkpoint)),
            *("--tensorboard-dir", str(self.directory / "tensorboard")),
            *("--train-data-path", train, "--valid-data-path", validation),
            *("--test-data-path", validation),
        ]
