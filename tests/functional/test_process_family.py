"""Launchers that end in every way, and what they had started: it ends within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron.early_exit import process_family

ROOT = Path(__file__).resolve().parents[2]
MARKS = os.environ.get(process_family.MARK, "").split()
WAIT_S = 60.0
"""Of a test that fails; what is right takes a second or two, six where SIGTERM is ignored."""

# In the place of torchrun and a rank: in sessions of their own, deaf to what can be ignored.
RANK = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if sys.argv[2] == "deaf" else signal.SIG_DFL)
print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
time.sleep(600)
"""
TORCHRUN = f"""
import os, subprocess, sys, time
ranks = [
    subprocess.Popen([sys.executable, "-c", {RANK!r}, *sys.argv[1:]], start_new_session=True)
    for _ in range(2)
]
print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
for rank in ranks:
    rank.wait()
"""
LAUNCHER = f"""
import subprocess, sys, time
from megatron.early_exit.process_family import run_program, started
command = [sys.executable, "-c", {TORCHRUN!r}, *sys.argv[1:]]

def by_started():
    with started(command) as process:
        process.wait()

def by_popen():
    # It waits for its process when an exception leaves it.
    with subprocess.Popen(command):
        time.sleep(600)

def fails():
    with started(command):
        while len(open(sys.argv[1]).readlines()) < 3:
            time.sleep(0.02)
        raise ValueError("of its own")

sys.exit(run_program(globals()[sys.argv[3]], "a rerun goes on"))
"""
AS_IN_BACKGROUND = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
"""What a shell without job control starts with & ignores SIGINT, and so does all below it."""


@pytest.fixture
def launch(tmp_path: Path):
    """Starts a launcher and waits until all that it starts is there; returns the processes."""
    launched: list[subprocess.Popen[str]] = []

    def launch_one(way: str, ears: str, **options) -> tuple[subprocess.Popen[str], set[int]]:
        pids = tmp_path / "pids"
        pids.touch()
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(pids), ears, way],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        launched.append(launcher)
        wait_until(lambda: len(pids.read_text().split()) == 3)
        return launcher, set(map(int, pids.read_text().split()))

    yield launch_one
    for launcher in launched:
        launcher.kill()
        launcher.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def are_gone(pids: set[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("way", "ears", "options"),
    [("by_started", "deaf", {}), ("by_popen", "hear", AS_IN_BACKGROUND)],
    ids=["deaf", "in background"],
)
def test_what_a_killed_launcher_had_started_ends(launch, number, way, ears, options):
    launcher, pids = launch(way, ears, **options)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=WAIT_S)
    if number == signal.SIGKILL:
        assert launcher.returncode == -number
    else:
        assert launcher.returncode == 128 + number
        told = f"ended by {number.name}, with all that it had started; a rerun goes on\n"
        assert errors == told
        assert are_gone(pids)
    wait_until(lambda: are_gone(pids))


def test_an_exception_ends_what_the_block_has_started(launch):
    launcher, pids = launch("fails", "hear")
    _, errors = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 1
    assert errors.endswith("ValueError: of its own\n")
    assert are_gone(pids)


def test_a_command_that_is_waited_for_keeps_its_result():
    with process_family.started(
        [sys.executable, "-c", "print('said'); raise SystemExit(3)"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.read() == "said\n"
        assert process.wait() == 3
    assert process.returncode == 3


def test_no_watcher_outlives_its_command():
    with process_family.started(["sleep", "600"]) as process:
        (watcher,) = (
            one
            for one in psutil.Process().children()
            if process_family.__file__ in one.cmdline() and one.cmdline()[-2] not in MARKS
        )
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM
    assert not watcher.is_running()


WORKER = """
import multiprocessing, os, sys, time
from megatron.early_exit.process_family import end_with_parent

def work():
    end_with_parent()
    print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    end_with_parent()
    multiprocessing.get_context("fork").Process(target=work).start()
    print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
    time.sleep(600)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_rank_ends_with_torchrun_and_a_worker_with_its_rank(tmp_path, by_torchrun):
    script, pids = tmp_path / "worker.py", tmp_path / "pids"
    script.write_text(WORKER)
    pids.touch()
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    if by_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script, pids],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    wait_until(lambda: len(pids.read_text().split()) == 2)
    started = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    rank, worker = sorted(started, key=lambda one: one.ppid() != parent.pid)
    try:
        parent.kill()
        parent.wait()
        if not by_torchrun:
            # As under nohup.
            time.sleep(1)
            assert not are_gone({rank.pid})
            rank.kill()
        wait_until(lambda: are_gone({rank.pid, worker.pid}))
    finally:
        for one in started:
            if not are_gone({one.pid}):
                one.kill()
