"""The text-generation server as its command line starts it: processes that can be killed."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.helpers.speed import patient
from tests.helpers.warm_ranks import JobRank, WarmRanks

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "run_early_exit_text_generation_server.py"
START_S = patient(120)
"""Time limit for loading libraries and a tiny model on a busy machine."""
WAIT_S = patient(40)
"""Time limit for what normally takes a moment, so that a failing test does not wait long."""


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        ranks: its processes, of which the first one serves; or torchrun alone.
        url: without a slash at the end.
        log: what the first one has written; or all, under torchrun.
    """

    ranks: Sequence[subprocess.Popen[bytes] | JobRank]
    url: str
    log: Path

    def post(self, body: Any, **options: Any) -> requests.Response:
        """Ask for a completion."""
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=START_S, **options)

    def health(self) -> requests.Response:
        """Request `/health`."""
        return requests.get(f"{self.url}/health", timeout=WAIT_S)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one of the processes."""
        self.ranks[rank].send_signal(number)

    def wait(self) -> int:
        """The exit status of the process that serves, or of torchrun."""
        return self.ranks[0].wait(WAIT_S)


def free_port() -> int:
    """A port on which no process listens, below the range of ports that the system assigns to
    connections."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Return as soon as a condition holds; fail after the time limit."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


@contextmanager
def server_process(
    checkpoint: Path,
    folder: Path,
    *flags: str,
    ranks: WarmRanks | None = None,
    num_ranks: int = 1,
    port: int | None = None,
) -> Iterator[ServerProcess]:
    """Serve a checkpoint until the block ends.

    Args:
        checkpoint: the checkpoint to serve.
        folder: for the log.
        flags: further flags of the tool, besides those for checkpoint and port.
        ranks: starts the processes quickly, of the kind "serving"; without it, torchrun does, as
            for a user.
        num_ranks: processes that divide the model.
        port: the port to listen on; None takes a free one.
    """
    port = port or free_port()
    command = [str(TOOL), "--load", str(checkpoint), "--port", str(port), "--device", "cpu", *flags]
    folder = folder / f"server{port}"
    folder.mkdir(exist_ok=True)
    log = folder / "rank0.log"
    processes: Sequence[subprocess.Popen[bytes] | JobRank]
    if ranks is None:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        torchrun += ["--master-port", str(free_port())]
        with log.open("ab") as file:
            words = [sys.executable, *torchrun, *command]
            processes = [subprocess.Popen(words, stdout=file, stderr=file)]
    else:
        processes = ranks.start(command, num_ranks, folder).ranks
    try:
        server = ServerProcess(processes, f"http://127.0.0.1:{port}", log)
        wait_until(lambda: _is_up(server), START_S)
        yield server
    finally:
        for process in processes:
            _end(process)


def _is_up(server: ServerProcess) -> bool:
    assert all(rank.poll() is None for rank in server.ranks), server.log.read_text()[-4000:]
    try:
        return server.health().ok
    except requests.ConnectionError:
        return False


def _end(process: subprocess.Popen[bytes] | JobRank) -> None:
    """Kill a process and all that it has started."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in started:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
    process.wait()
