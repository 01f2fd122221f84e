"""The server of `serve_load.py` and `soak.py`: its process, its health, its memory."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil

from megatron.early_exit.process_family import started

TOOL = Path(__file__).resolve().parents[1] / "tools" / "run_early_exit_text_generation_server.py"
_SAMPLE_S = 0.5
_START_S = 120.0


@contextlib.contextmanager
def served(checkpoint: Path, folder: Path, max_batch_size: int, threads: int) -> Iterator[str]:
    """The address of a server that ends with the block.

    Args:
        checkpoint: the checkpoint to serve.
        folder: the folder for the log.
        max_batch_size: the server's flag.
        threads: the number of threads that the server computes with.
    """
    port = _free_port()
    command = [sys.executable, str(TOOL), "--load", str(checkpoint), "--port", str(port)]
    command += ["--max-batch-size", str(max_batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (
        (folder / "server.log").open("w") as log,
        started(command, stdout=log, stderr=log, env=environment) as process,
    ):
        until = time.monotonic() + _START_S
        url = f"http://127.0.0.1:{port}"
        while health(url) is None:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)
        yield url


def _free_port() -> int:
    """A port that nobody listens on."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port: int = taken.getsockname()[1]
        return port


def health(url: str) -> dict[str, Any] | None:
    """The body of the server's /health; None if it does not answer yet."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
            return found
    except OSError:
        return None


def listener(port: int) -> psutil.Process:
    """The process that listens on a port of this machine."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            return psutil.Process(connection.pid)
    raise SystemExit(f"--url: no process on this machine listens on port {port}")


@dataclass
class Memory:
    """The resident memory, threads and open files of a process, sampled under load."""

    process: psutil.Process
    samples: list[tuple[float, float]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    async def watch(self) -> None:
        """Take samples until cancelled; seconds of load count, not those in between."""
        begin = time.perf_counter() - self._seconds()
        while True:
            self._sample(time.perf_counter() - begin)
            await asyncio.sleep(_SAMPLE_S)

    def _seconds(self) -> float:
        return self.samples[-1][0] if self.samples else 0.0

    def _sample(self, seconds: float) -> None:
        self.samples.append((seconds, self.process.memory_info().rss / 2**20))
        self.threads.append(self.process.num_threads())
        self.descriptors.append(self.process.num_fds())

    def figures(self) -> dict[str, float]:
        """Medians of the middle and the last third, and the slope over both.

        A load that ended before it had a sample for each third gets the others now.
        """
        while len(self.samples) < 3:
            self._sample(self._seconds() + _SAMPLE_S)
        third = len(self.samples) // 3
        seconds, sizes = zip(*self.samples[third:], strict=True)
        middle, last = median(sizes[:third]), median(sizes[third:])
        return {
            "memory_middle_mib": middle,
            "memory_last_mib": last,
            "memory_growth": last / middle - 1,
            "memory_slope_mib_per_minute": 60 * linear_regression(seconds, sizes).slope,
            "threads_middle": median(self.threads[third : 2 * third]),
            "threads_last": median(self.threads[2 * third :]),
            "descriptors_middle": median(self.descriptors[third : 2 * third]),
            "descriptors_last": median(self.descriptors[2 * third :]),
        }
