"""Starts training commands and servers quickly: one process imports what they need, and every rank
is a fork of it.

Importing torch and Megatron takes several seconds, longer than the rest of a tiny run. In all other
respects ranks are separate processes, with their own session, environment and output."""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import inspect
import json
import os
import queue
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore

from tests.helpers.speed import patient

ROOT = Path(__file__).parents[2]
_RANK = re.compile(r"^(?=\[rank\d+\]$)", re.MULTILINE)
ENTRY = ROOT / "pretrain_early_exit_gpt.py"


def tails(output: str, size: int = 3000) -> str:
    """The end of each rank's output, taken from the output of all ranks."""
    parts = (part.split("\n", 1) for part in _RANK.split(output) if part)
    return "\n".join(f"{name}\n{rest[-size:]}" for name, rest in parts)


class WarmRanks:
    """The process that the ranks are forked from; a context manager.

    Args:
        kind: what the ranks do, one of `KINDS`.
    """

    def __init__(self, kind: str = "training") -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Four ranks need no four GPUs: what is tested here is the same over gloo.
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            start_new_session=True,
        )

    def __enter__(self) -> WarmRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request to the fork server, and return its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the server of warm ranks has died"
        return json.loads(answer)

    def start(
        self,
        script_args: Sequence[str | Path],
        nproc: int,
        folder: Path,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Start `script_args` (a Python file and its arguments) on `nproc` ranks.

        Args:
            folder: gets the output of rank N in `rankN.log`.
        """
        # As torchrun does it. A port that is only looked up here could be taken by another process
        # before rank 0 listens on it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder.mkdir(parents=True, exist_ok=True)
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            **(env or {}),
        }
        ranks = [
            {
                "argv": [str(arg) for arg in script_args],
                "env": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "log": str(folder / f"rank{rank}.log"),
            }
            for rank in range(nproc)
        ]
        return Job(self, self.ask({"start": ranks}), folder, store)

    def run(
        self,
        script_args: Sequence[str | Path],
        nproc: int,
        folder: Path,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Start and wait; the result's `stdout` is the output of all ranks, one after the other."""
        job = self.start(script_args, nproc, folder, env)
        returncode = job.wait(patient(250))
        return subprocess.CompletedProcess([*script_args], returncode, job.output(), "")


class Job:
    """The ranks of one command.

    Attributes:
        pids: their processes; each leads a session.
    """

    def __init__(self, server: WarmRanks, pids: list[int], folder: Path, store: TCPStore) -> None:
        self._server = server
        self._store = store
        self.pids = pids
        self._folder = folder
        self._statuses: dict[int, int] = {}

    def poll(self) -> int | None:
        """None while no rank has failed and some still run; then the status of the first that
        failed, or 0."""
        alive = [pid for pid in self.pids if pid not in self._statuses]
        for pid, status in self._server.ask({"poll": alive}).items():
            self._statuses[int(pid)] = status
        failed = [status for status in self._statuses.values() if status]
        if failed:
            return failed[0]
        return 0 if len(self._statuses) == len(self.pids) else None

    def wait(self, timeout_s: float) -> int:
        """Wait for the end of the job and return its status; processes that are left are killed."""
        deadline = time.monotonic() + timeout_s
        status = self.poll()
        while status is None and time.monotonic() < deadline:
            time.sleep(0.02)
            status = self.poll()
        # What the others say about a rank's death does not matter, but what they say before does.
        time.sleep(0.2 if status else 0)
        self.kill()
        return -signal.SIGKILL if status is None else status

    @property
    def ranks(self) -> list[JobRank]:
        """The ranks, to be signalled and waited for one by one."""
        return [JobRank(self, pid) for pid in self.pids]

    def status(self, pid: int) -> int | None:
        """The exit status of a rank that has ended, None of one that has not."""
        self.poll()
        return self._statuses.get(pid)

    def kill(self) -> None:
        """Send SIGKILL to every rank and all processes that it has started."""
        for pid in self.pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while any(pid not in self._statuses for pid in self.pids):
            self.poll()

    def output(self) -> str:
        """What the ranks have written so far."""
        logs = sorted(self._folder.glob("rank*.log"))
        return "\n".join(f"[{log.stem}]\n{log.read_text(errors='replace')}" for log in logs)


@dataclass(frozen=True)
class JobRank:
    """One rank of a job, with the methods of `subprocess.Popen`."""

    job: Job
    pid: int

    def poll(self) -> int | None:
        """The exit status, None before the end."""
        return self.job.status(self.pid)

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for the end and return the exit status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to a rank that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill a rank that has not ended."""
        self.send_signal(signal.SIGKILL)


def _import_for_training() -> None:
    from megatron.early_exit import platform

    platform.prepare()
    # Megatron imports the first two late, and they are half of what a rank would have to do.
    import megatron.core.tokenizers.text  # noqa: F401
    import torch._dynamo  # noqa: F401
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.arguments import add_megatron_arguments
    from torch.utils import tensorboard  # noqa: F401

    from megatron.early_exit.training import session  # noqa: F401
    from megatron.early_exit.training.cli import command_line  # noqa: F401

    # Else every rank starts a process that imports torch, to hand a list over to itself.
    writers: Any = filesystem_async
    writers._results_queue = queue.Queue()
    # Megatron takes the help on its flags from the source of its classes, at every start.
    inspector: Any = inspect
    inspector.getsource = functools.cache(inspect.getsource)
    add_megatron_arguments(argparse.ArgumentParser())


def _import_for_serving() -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    from tools import run_early_exit_text_generation_server  # noqa: F401


KINDS = {"training": _import_for_training, "serving": _import_for_serving}


def _serve() -> None:
    KINDS[sys.argv[1]]()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Ranks would look through all that is imported for garbage, each on its own copy.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = [_fork(rank) for rank in request["start"]]
        else:
            answer = _ended(request["poll"])
        print(json.dumps(answer), file=answers, flush=True)


def _ended(pids: list[int]) -> dict[int, int]:
    ended = {}
    for pid in pids:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _fork(rank: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        # Until the child leads its session, killing the session would miss it.
        while os.getsid(pid) != pid:
            time.sleep(0.001)
        return pid
    os.setsid()
    log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(rank["env"])
    sys.argv = rank["argv"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    status: Any = None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status)


def _end(status: Any) -> NoReturn:
    """Ends a rank as Python does, but for taking apart all that is imported: with Megatron it takes
    longer than most runs."""
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threads: Any = threading
    threads._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    _serve()
