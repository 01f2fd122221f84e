"""A training run that is killed and resumes, and the moments at which it is killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.speed import patient
from tests.helpers.training_runs import BACKBONE, SCHEDULE, TOKENIZER
from tests.helpers.warm_ranks import ENTRY, Job, WarmRanks

SAVE_INTERVAL, NPROC = 3, 2
LIFE_TIMEOUT_S = patient(200)


def flags(iterations: int) -> list[object]:
    """Two stages with dropout, a decaying learning rate, and exits whose weights warm up."""
    return [
        *("--pipeline-model-parallel-size", NPROC, "--exit-layer-nums", 1, 3, "--use-exit-norm"),
        *("--use-exit-block", "--exit-layer-weight-warmup-iters", 40),
        *("--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--lr-decay-style", "cosine"),
        *("--train-iters", iterations, "--save-interval", SAVE_INTERVAL),
        *("--eval-interval", 5, "--eval-iters", 1),
    ]


@dataclass
class Training:
    """One training run with all of its lives: a life lasts from a start to a kill or the end."""

    ranks: WarmRanks
    folder: Path
    flags: list[object]
    started: float = 0.0

    @property
    def save(self) -> Path:
        """The directory of its checkpoints."""
        return self.folder / "save"

    def command(self) -> list[str]:
        """The entry point and its flags."""
        save = self.save
        here = ["--save", save, "--load", save, "--tensorboard-dir", self.folder / "events"]
        return list(map(str, [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *self.flags, *here]))

    def start(self, life: int) -> Job:
        """Begin a life on warm ranks."""
        self.started = time.time()
        return self.ranks.start(self.command(), NPROC, self.folder / f"life-{life}")

    def finish(self, life: int) -> str:
        """Run a life to the end; returns the output."""
        job = self.start(life)
        status = job.wait(LIFE_TIMEOUT_S)
        assert status == 0, job.output()[-6000:]
        return job.output()

    def log(self) -> dict[str, dict[int, set[float]]]:
        """The values that all lives together logged, by figure and step, without times and
        memory."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "events"), size_guidance={"scalars": 0})
        log: dict[str, dict[int, set[float]]] = {}
        for tag in events.Reload().Tags()["scalars"]:
            if "time" in tag or "memory" in tag:
                continue
            for event in events.Scalars(tag):
                log.setdefault(tag, {}).setdefault(event.step, set()).add(event.value)
        return log

    def newest(self) -> Path | None:
        """The directory of the newest checkpoint, finished or not."""
        return max(self.save.glob("iter_*"), default=None)


# A moment is a question about a training, asked again and again until the answer is yes.
Moment = Callable[[Training], bool]


def at_once(_: Training) -> bool:
    """The moment to kill a life at once."""
    return True


def after_a_step(training: Training) -> bool:
    """Whether this life has taken a step."""
    logs = max(training.folder.glob("life-*"), key=lambda path: path.stat().st_mtime_ns)
    log = logs / f"rank{NPROC - 1}.log"
    return log.exists() and "] iteration " in log.read_text(errors="replace")


def has(checkpoint: Path, part: str) -> bool:
    """Whether a checkpoint has a file that matches `part`. The file that is written last counts
    only when it has its text, because it exists for a moment without it."""
    return any(file.stat().st_size > 0 or file.suffix != ".json" for file in checkpoint.glob(part))


def during_a_save(*parts: str) -> Moment:
    """The moment when a checkpoint directory of a life contains a match for each of `parts`."""

    def moment(training: Training) -> bool:
        newest = training.newest()
        if newest is None:
            return False
        try:
            began = newest.stat().st_mtime
            return began >= training.started and all(has(newest, part) for part in parts)
        except FileNotFoundError:
            # What the life before left unfinished is being put out of the way.
            return False

    return moment


PHASES = {
    "directory": during_a_save(),
    "some data": during_a_save("*.distcp"),
    "all data": during_a_save("__0_0.distcp", "__1_0.distcp"),
    "index": during_a_save(".metadata"),
    "finished, not named": during_a_save("metadata.json"),
}
"""Moments during a save, identified by the files that have been written."""


def moments(random_: random.Random) -> list[tuple[str, Moment, float]]:
    """Ten moments, as a name, the moment, and seconds to wait after it."""
    chosen = [(name, moment, 0.0) for name, moment in PHASES.items()]
    chosen += [
        ("start", at_once, random_.uniform(0, 3)),
        ("step", after_a_step, random_.uniform(0, 0.2)),
        ("step", after_a_step, random_.uniform(0, 0.4)),
        ("save", during_a_save(), random_.uniform(0, 0.05)),
        ("save", during_a_save(), random_.uniform(0, 0.1)),
    ]
    random_.shuffle(chosen)
    return chosen
