"""Shared code of the parts of `soak.py` that have a server: the server, valid requests, checks."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from serve_clients import Client, Record
from serve_models import make_checkpoint
from serve_process import Memory, health, listener, served
from serve_requests import Item, Question, make_questions
from soak_report import PartResult

from megatron.early_exit.inference import EarlyExitEngine

GROWTH = 0.03
"""Allowed growth of the server's memory, from the middle third of a part to the last."""
JUDGED_S = 600.0
"""Growth is checked only in parts that take this long: before, threads may get their first
requests."""
MORE_THREADS, MORE_FILES = 2, 8
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Soaked:
    """The server of a part.

    Attributes:
        host: where it listens.
        port: where it listens.
        log: what it writes.
        memory: of its process.
        questions: with the answers that the engine gives to each alone.
    """

    host: str
    port: int
    log: Path
    memory: Memory
    questions: Sequence[Question]

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    async def ask(self, item: Item) -> Record:
        """Ask over a connection of its own."""
        client = Client(self.host, self.port)
        record = Record(item)
        await client.ask(record)
        client.close()
        return record

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Take samples of its memory while the block lasts."""
        watcher = asyncio.create_task(self.memory.watch())
        try:
            yield
        finally:
            watcher.cancel()

    def judge(self, report: PartResult, seconds: float) -> None:
        """Add the promises that hold whatever the clients do: the server runs, has no requests
        left, has not grown, and its log has no traceback."""
        last = health(self.url)
        until = time.monotonic() + _SETTLE_S
        while (last is None or _left(last)) and time.monotonic() < until:
            time.sleep(0.5)
            last = health(self.url)
        is_alive = last is not None and self.memory.process.is_running()
        report.promise("the server serves at the end", "yes" if is_alive else "no", is_alive)
        report.promise("no request is left running or waiting in it", _left(last), _left(last) == 0)
        tracebacks = self.log.read_text(errors="replace").count("Traceback")
        report.promise("no traceback in its log", tracebacks, tracebacks == 0)
        figures = self.memory.figures()
        report.figures |= figures
        growth = figures["memory_growth"]
        found = f"{growth:+.1%}, to {figures['memory_last_mib']:.0f} MiB"
        is_long = seconds >= JUDGED_S
        text = f"its memory grows by no more than {GROWTH:.0%}"
        report.promise(text, found, growth <= GROWTH if is_long else None)
        for name, most in (("threads", MORE_THREADS), ("descriptors", MORE_FILES)):
            middle, end = figures[f"{name}_middle"], figures[f"{name}_last"]
            holds = end <= middle + most if is_long else None
            report.promise(f"its {name} do not grow", f"{middle:.0f} -> {end:.0f}", holds)


def _left(found: dict[str, int] | None) -> int:
    if found is None:
        return 0
    return int(found["num_requests_running"]) + int(found["num_requests_waiting"])


@contextlib.contextmanager
def soaked(args: argparse.Namespace, folder: Path) -> Iterator[Soaked]:
    """A server of random weights until the block ends."""
    torch.set_num_threads(args.threads)
    checkpoint = make_checkpoint(args.model, folder)
    engine = EarlyExitEngine.from_checkpoint(checkpoint, max_batch_size=args.max_batch_size)
    questions = make_questions(engine)
    with served(checkpoint, folder, args.max_batch_size, args.threads) as url:
        place = urlsplit(url)
        assert place.hostname is not None
        assert place.port is not None
        memory = Memory(listener(place.port))
        log = folder / "server.log"
        yield Soaked(place.hostname, place.port, log, memory, questions)
