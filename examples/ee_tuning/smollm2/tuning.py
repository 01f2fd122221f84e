"""The tuning stage: which exits SmolLM2 gets, and how many steps fit into a time."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.stages import follow_training

EXIT_LAYERS = (12, 20)
HEADS = "--use-exit-block --use-exit-norm --exit-vocab-size 8192"
OBJECTIVE = "--exit-distillation-weight 1"
BATCH, SEQUENCE = 8, 256
OPTIMIZATION = f"""
    --bf16 --micro-batch-size {BATCH} --global-batch-size {BATCH} --seq-length {SEQUENCE}
    --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0
    --clip-grad 1.0
"""
TRIAL_STEPS = 8

_STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Where a run reads and writes.

    Attributes:
        base: the imported model.
        data: folder of the indexed data sets.
        directory: gets `checkpoint/`, `tensorboard/` and `log.txt`.
    """

    base: Path
    data: Path
    directory: Path

    @property
    def checkpoint(self) -> Path:
        """The exits."""
        return self.directory / "checkpoint"

    @property
    def is_finished(self) -> bool:
        """Whether there are tuned exits."""
        return (self.checkpoint / "latest_checkpointed_iteration.txt").exists()

    def run(self, steps: int, directory: Path | None = None) -> Path:
        """Tune from the start; what an earlier run left goes. Returns the log.

        Raises:
            SystemExit: it failed.
        """
        directory = directory or self.directory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        log = directory / "log.txt"
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        follow_training(self.command(steps, directory), log, {"OMP_NUM_THREADS": threads})
        return log

    def steps_within(self, seconds: float) -> int:
        """How many steps take that long, by a short trial."""
        trial = self.directory.with_name("trial")
        log = self.run(TRIAL_STEPS, trial).read_text()
        # Steps become faster for a while: the fastest of few is what most of many take.
        fastest = min(float(found) for found in _STEP_MS.findall(log))
        shutil.rmtree(trial)
        return max(TRIAL_STEPS, int(seconds * 1000 / fastest))

    def command(self, steps: int, directory: Path) -> list[str]:
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
            *("--load", str(self.base), "--use-checkpoint-args"),
            *("--save", str(directory / "checkpoint")),
            *("--tensorboard-dir", str(directory / "tensorboard")),
            *("--train-data-path", train, "--valid-data-path", validation),
            *("--test-data-path", validation),
        ]
