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

import psutil
import pytest

from megatron.early_exit import platform
from tests.helpers.speed import patient

platform.prepare()

from tests.helpers.killed_training import (  # noqa: E402
    LIFE_TIMEOUT_S,
    NPROC,
    Moment,
    Training,
    flags,
    moments,
)
from tests.helpers.training_runs import write_documents  # noqa: E402
from tests.helpers.warm_ranks import ROOT, Job, WarmRanks  # noqa: E402

ITERATIONS = 60


@pytest.fixture(scope="module")
def trainings(
    ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Training]:
    folder = tmp_path_factory.mktemp("kill")
    data = write_documents(folder)
    return lambda name: Training(ranks, folder / name, [*flags(ITERATIONS), *data])


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
    assert {"lm loss", "exit 1 loss", "exit 3 accuracy", "grad-norm"} <= set(expected)
    for tag in expected:
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
    training = trainings("launched").command()
    endless = ["--train-iters", 10**6, "--num-workers", 1, "--save", save, "--load", save]
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
