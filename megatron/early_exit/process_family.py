"""What a program starts ends with it: at its end, by a signal, or when it dies without a word.

Killing a process group is not enough: torchrun gives each rank a session of its own, and whoever
outlives its parent is handed to another one. So everything that a program starts inherits a mark in
its environment, by which it is found wherever it is. A watcher, a small process beside the program,
does the same when the program itself has been killed."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import psutil

MARK = "EARLY_EXIT_PROCESS_FAMILIES"
"""Environment variable with the names of the families that a process belongs to."""
GRACE_S = 5.0
"""From SIGTERM to SIGKILL."""
_LAST_S = 5.0
"""For processes to go after SIGKILL, which is the kernel's to do."""
_POLL_S, _WATCH_S = 0.05, 0.25


def start_family() -> str:
    """From now on, what this process starts, and what that starts in turn, ends when it ends.

    Processes that are forked without starting a program of their own, such as a `DataLoader`'s
    workers, are not part of it: they watch their parent.

    Returns:
        The family's name."""
    name = _new_name()
    _start_watcher(name)
    os.environ[MARK] = _marks(os.environ, name)
    return name


def _new_name() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _marks(environment: Mapping[str, str], name: str) -> str:
    return f"{environment.get(MARK, '')} {name}".strip()


def members(name: str) -> list[psutil.Process]:
    """The living processes of a family, without the caller."""
    # Python's own helper goes with this process; before, it heeds no signal but SIGKILL.
    own = (os.getpid(), getattr(resource_tracker._resource_tracker, "_pid", None))
    found = []
    for process in psutil.process_iter():
        # Those of other users, and those that are gone by now.
        with suppress(psutil.Error, OSError):
            marks = process.environ().get(MARK, "").split()
            if name in marks and process.pid not in own:
                found.append(process)
    return found


def end(name: str, grace_s: float = GRACE_S) -> None:
    """Have all processes of a family end: SIGTERM, and SIGKILL for those that take too long."""
    begin = time.monotonic()
    told: set[psutil.Process] = set()
    while (living := members(name)) and time.monotonic() < begin + grace_s + _LAST_S:
        is_late = time.monotonic() > begin + grace_s
        for process in living:
            if is_late or process not in told:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL if is_late else signal.SIGTERM)
        told.update(living)
        time.sleep(_POLL_S)


@contextmanager
def started(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[subprocess.Popen[Any]]:
    """A command that runs while the block lasts.

    At the end of the block, or when an exception leaves it, all that the command has started has
    ended too; a block that wants its result waits for it.

    Args:
        command: program and arguments.
        env: the environment, else this process's own.
        options: of `subprocess.Popen`.
    """
    name = _new_name()
    environment = {**(os.environ if env is None else env)}
    environment[MARK] = _marks(environment, name)
    watcher = _start_watcher(name)
    try:
        process = subprocess.Popen(command, env=environment, **options)
        try:
            yield process
        finally:
            end(name)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
    finally:
        watcher.kill()
        watcher.wait()


class Interrupted(SystemExit):
    """SIGINT or SIGTERM has come, and what the program had started has been ended."""


def run_program(main: Callable[[], int | None], afterwards: str = "") -> int:
    """Run a program's main function; SIGINT and SIGTERM end it and all that it has started.

    Args:
        main: returns the exit status, None for 0.
        afterwards: what the user may do about an interrupt, for the line that is printed then.

    Returns:
        The exit status: 128 and the signal's number after a signal, as shells have it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        # First of all: while this raises, some would wait for the ends of their processes.
        end(name)
        raise Interrupted(128 + number)

    name = start_family()
    # Also where SIGINT is ignored, as it is in what a shell starts in the background.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, interrupt)
    try:
        return main() or 0
    except Interrupted as interrupted:
        status = int(str(interrupted.code))
        told = f"ended by {signal.Signals(status - 128).name}, with all that it had started"
        print("; ".join(filter(None, (told, afterwards))), file=sys.stderr, flush=True)
        return status


def end_with_parent() -> None:
    """Have this process and its children end when its parent dies, if that is torchrun or Python's
    `multiprocessing`, which do not see to it when they are killed.

    Any other parent may go: a shell, say, that has started this process to outlive it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and multiprocessing.parent_process() is None:
        return
    parent = os.getppid()

    def watch() -> None:
        _wait_for_end_of(parent)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _wait_for_end_of(parent: int) -> None:
    # Whoever is orphaned gets another parent; this holds on every Unix.
    while os.getppid() == parent:
        time.sleep(_WATCH_S)


def _start_watcher(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # As a file: the package around it takes longer to import than a family may live.
        [sys.executable, "-P", __file__, name, str(os.getpid())],
        # Part of no family: it goes by itself when its parent has.
        env={name: value for name, value in os.environ.items() if name != MARK},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(name: str, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_end_of(parent)
    end(name)


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))
