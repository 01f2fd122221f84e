"""Training that is killed at any moment goes on as if nothing had happened.

Killing the program that launched torchrun ends the training with it.

Two pipeline stages with dropout, a decaying learning rate and exits whose weights warm up are
killed ten times, at moments that a fixed seed chooses: while starting, between two steps, and in
every phase of writing a checkpoint. What they logged in the end equals the log of a run that nobody
disturbed, bit for bit and step for step."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron.early_exit import platform
from tests.helpers.speed import patient

platform.prepare()

from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    SCHEDULE,
    TOKENIZER,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, ROOT, Job, WarmRanks  # noqa: E402

ITERATIONS, SAVE_INTERVAL, NPROC = 60, 3, 2
FLAGS = [
    *("--pipeline-model-parallel-size", NPROC, "--exit-layer-nums", 1, 3, "--use-exit-norm"),
    *("--use-exit-block", "--exit-layer-weight-warmup-iters", 40),
    *("--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--lr-decay-style", "cosine"),
    *("--train-iters", ITERATIONS, "--save-interval", SAVE_INTERVAL),
    *("--eval-interval", 5, "--eval-iters", 1),
]
LIFE_TIMEOUT_S = patient(200)


@dataclass
class Training:
    """One training run, however many lives it takes."""

    ranks: WarmRanks
    folder: Path
    flags: list[object]
    started: float = 0.0

    def start(self, life: int) -> Job:
        self.started = time.time()
        save = self.folder / "save"
        here = ["--save", save, "--load", save, "--tensorboard-dir", self.folder / "events"]
        command = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *self.flags, *here]
        return self.ranks.start(list(map(str, command)), NPROC, self.folder / f"life-{life}")

    def finish(self, life: int) -> str:
        """Live on to the end; returns the output."""
        job = self.start(life)
        status = job.wait(LIFE_TIMEOUT_S)
        assert status == 0, job.output()[-6000:]
        return job.output()

    def log(self) -> dict[str, dict[int, set[float]]]:
        """What all lives together logged: for each figure and step, the values."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "events"), size_guidance={"scalars": 0})
        log: dict[str, dict[int, set[float]]] = {}
        for tag in events.Reload().Tags()["scalars"]:
            for event in events.Scalars(tag):
                log.setdefault(tag, {}).setdefault(event.step, set()).add(event.value)
        return log

    def newest(self) -> Path | None:
        """The directory of the newest checkpoint, finished or not."""
        return max((self.folder / "save").glob("iter_*"), default=None)


@pytest.fixture(scope="module")
def trainings(
    ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Training]:
    folder = tmp_path_factory.mktemp("kill")
    data = write_documents(folder)
    return lambda name: Training(ranks, folder / name, [*FLAGS, *data])


# A moment is a question about a training, asked again and again until the answer is yes.
Moment = Callable[[Training], bool]


def at_once(_: Training) -> bool:
    return True


def after_a_step(training: Training) -> bool:
    logs = max(training.folder.glob("life-*"), key=lambda path: path.stat().st_mtime_ns)
    log = logs / f"rank{NPROC - 1}.log"
    return log.exists() and "] iteration " in log.read_text(errors="replace")


def during_a_save(*parts: str) -> Moment:
    """When a checkpoint directory of this life holds something that matches each of `parts`."""

    def moment(training: Training) -> bool:
        newest = training.newest()
        if newest is None:
            return False
        try:
            began = newest.stat().st_mtime
        except FileNotFoundError:
            # What the life before left unfinished is being put out of the way.
            return False
        return began >= training.started and all(any(newest.glob(part)) for part in parts)

    return moment


def moments(random_: random.Random) -> list[tuple[str, Moment, float]]:
    """Ten of them: name, moment, seconds to wait after it."""
    phases = {
        "directory": during_a_save(),
        "some data": during_a_save("*.distcp"),
        "all data": during_a_save("__0_0.distcp", "__1_0.distcp"),
        "index": during_a_save(".metadata"),
        "finished, not named": during_a_save("metadata.json"),
    }
    chosen = [(name, moment, 0.0) for name, moment in phases.items()]
    chosen += [
        ("start", at_once, random_.uniform(0, 3)),
        ("step", after_a_step, random_.uniform(0, 0.2)),
        ("step", after_a_step, random_.uniform(0, 0.4)),
        ("save", during_a_save(), random_.uniform(0, 0.05)),
        ("save", during_a_save(), random_.uniform(0, 0.1)),
    ]
    random_.shuffle(chosen)
    return chosen


@pytest.mark.timeout(patient(1200))
def test_a_run_killed_ten_times_equals_one_that_was_not(trainings):
    undisturbed = trainings("undisturbed")
    undisturbed.finish(0)
    expected = undisturbed.log()
    assert sorted(expected["lm loss"]) == list(range(1, ITERATIONS + 1))

    killed = trainings("killed")
    kills = moments(random.Random(20))
    assert len(kills) == 10
    for life, (name, moment, delay_s) in enumerate(kills):
        job = killed.start(life)
        wait_for(moment, killed, job)
        time.sleep(delay_s)
        job.kill()
        print(f"life {life}: killed at {name} + {delay_s:.2f} s, {killed.newest()}")
    output = killed.finish(len(kills))
    assert "successfully loaded checkpoint" in output

    found = killed.log()
    compared = [tag for tag in expected if "time" not in tag and "memory" not in tag]
    assert {"lm loss", "exit 1 loss", "exit 3 accuracy", "grad-norm"} <= set(compared)
    for tag in compared:
        assert found[tag] == expected[tag], tag


def wait_for(moment: Moment, training: Training, job: Job) -> None:
    deadline = time.monotonic() + LIFE_TIMEOUT_S
    looked = time.monotonic()
    while not moment(training):
        if time.monotonic() > looked + 0.5:
            assert job.poll() is None, f"ended by itself\n{job.output()[-4000:]}"
            looked = time.monotonic()
            assert looked < deadline
        time.sleep(0.0005)


LAUNCHER = """
import sys
from pathlib import Path
from examples.stages import follow_training
from megatron.early_exit.process_family import run_program
sys.exit(run_program(lambda: follow_training(sys.argv[2:], Path(sys.argv[1]))))
"""


def test_the_death_of_the_launcher_ends_torchrun_and_its_ranks(trainings, tmp_path):
    log, save = tmp_path / "log.txt", tmp_path / "save"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    training = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *trainings("launched").flags]
    endless = ["--train-iters", 10**6, "--num-workers", 1, "--save", save]
    command = [*torchrun, "--nproc-per-node", NPROC, *training, *endless]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, log, *map(str, command)], cwd=ROOT, text=True
    )
    try:
        until = time.monotonic() + LIFE_TIMEOUT_S
        # Torchrun, two ranks with their data workers, and who collects what was written.
        while not any(save.glob("iter_*/metadata.json")):
            assert launcher.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until
            time.sleep(0.2)
        started = [
            one
            for one in psutil.Process(launcher.pid).children(recursive=True)
            # Whose job begins now.
            if "process_family.py" not in " ".join(one.cmdline())
        ]
        assert len(started) >= 1 + NPROC
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        until = time.monotonic() + 60
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started):
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        launcher.terminate()
        launcher.wait()
