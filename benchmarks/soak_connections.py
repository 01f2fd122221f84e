"""The part of `soak.py` with connections that keep the server waiting.

They send nothing, half of the headers, one byte of the headers now and then, or half of a body, or
do not read the response. Connections that the server closes are opened again, so that their number
stays the same. All the while, `/health` has to answer within a second, and well-behaved clients
have to get the right answers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import resource
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from serve_requests import Item
from soak_report import PartResult, ProgressLine
from soak_server import Soaked, soaked

from megatron.early_exit.client.figures import percentile

HEALTH_S = 1.0
_PROBE_S = 0.25
_PER_S = 200
"""New connections per second; few enough not to fill the server's queue, which is not tested
here."""
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_LONG = b'{"prompt": "the quick", "max_tokens": 64, "ignore_eos": true, "stream": true}'
_PAGES = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20
"""Requests that are cheap to answer: the test is about waiting, not about computing."""
KINDS = ("idle", "half headers", "trickled headers", "half body", "slow reader", "pages unread")


@dataclass
class Tally:
    """The observations so far."""

    opened: Counter[str] = field(default_factory=Counter)
    is_open: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    health: list[float] = field(default_factory=list)
    health_missed: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Connections that are open now."""
        return sum(self.is_open.values())


async def _hold(soaked: Soaked, kind: str, tally: Tally) -> None:
    """One connection, until the server closes it."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    if kind in ("slow reader", "pages unread"):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    try:
        async with asyncio.timeout(30):
            await loop.sock_connect(connection, (soaked.host, soaked.port))
        tally.opened[kind] += 1
        tally.is_open[kind] += 1
        try:
            await _keep(loop, connection, kind)
        finally:
            tally.is_open[kind] -= 1
    except (OSError, TimeoutError):
        tally.refused += 1
    finally:
        connection.close()


async def _keep(loop: asyncio.AbstractEventLoop, connection: socket.socket, kind: str) -> None:
    lengths = f"Content-Length: {len(_LONG)}\r\n\r\n".encode()
    first = {
        "idle": b"",
        "half headers": _HEAD,
        "trickled headers": b"GET /health HTTP/1.1\r\nX-Slow: ",
        "half body": _HEAD + lengths + _LONG[:20],
        "slow reader": _HEAD + lengths + _LONG,
        "pages unread": _PAGES,
    }[kind]
    with contextlib.suppress(OSError):
        if first:
            await loop.sock_sendall(connection, first)
        while True:
            if kind == "trickled headers":
                await asyncio.sleep(2)
                await loop.sock_sendall(connection, b"a")
            elif kind in ("slow reader", "pages unread"):
                # A byte every ten seconds says whether it is still there.
                await asyncio.sleep(10)
                if not await loop.sock_recv(connection, 1):
                    return
            elif not await loop.sock_recv(connection, 64):
                return


async def _fill(soaked: Soaked, number: int, random_: random.Random, tally: Tally) -> None:
    """Keep so many connections open."""
    holding: set[asyncio.Task[None]] = set()
    try:
        while True:
            for _ in range(min(number - len(holding), max(1, _PER_S // 10))):
                task = asyncio.create_task(_hold(soaked, random_.choice(KINDS), tally))
                holding.add(task)
                task.add_done_callback(holding.discard)
            await asyncio.sleep(0.1)
    finally:
        for task in list(holding):
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)


async def _probe(soaked: Soaked, tally: Tally) -> None:
    """Request `/health` again and again, over new connections."""
    while True:
        begin = perf_counter()
        try:
            async with asyncio.timeout(10 * HEALTH_S):
                reader, writer = await asyncio.open_connection(soaked.host, soaked.port)
                writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                answer = await reader.read()
                writer.close()
            if not answer.startswith(b"HTTP/1.1 200"):
                tally.health_missed += 1
        except (OSError, TimeoutError):
            tally.health_missed += 1
        tally.health.append(perf_counter() - begin)
        await asyncio.sleep(_PROBE_S)


async def _ask(soaked: Soaked, random_: random.Random, tally: Tally) -> None:
    """Send ordinary requests, one after the other, and count their answers."""
    while True:
        question = random_.choice(soaked.questions)
        begin = perf_counter()
        record = await soaked.ask(Item(question, random_.random() < 0.5, None))
        tally.seconds.append(perf_counter() - begin)
        if record.is_right():
            tally.right += 1
        else:
            tally.wrong.append(f"{record.status} {b''.join(record.parts)[:300]!r}")
        await asyncio.sleep(0.2)


async def _besiege(soaked: Soaked, args: argparse.Namespace, tally: Tally) -> int:
    """Return the largest number of connections that were open at a time."""
    random_ = random.Random(args.seed)
    whole = args.connections / _PER_S + args.hold
    progress = ProgressLine("connections", whole, "seconds")
    begin, most = perf_counter(), 0
    async with soaked.watched():
        tasks = [
            asyncio.create_task(_fill(soaked, args.connections, random_, tally)),
            asyncio.create_task(_probe(soaked, tally)),
            asyncio.create_task(_ask(soaked, random_, tally)),
        ]
        try:
            # At least until one good client has its answer, or has lost its patience.
            while perf_counter() < begin + whole or not tally.seconds:
                done, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                most = max(most, tally.total)
                slowest = max(tally.health, default=0.0)
                note = f"{tally.total} open, slowest health {slowest:.2f} s, {tally.right} right"
                progress.tell(perf_counter() - begin, note)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return most


def run_connections(args: argparse.Namespace, folder: Path) -> PartResult:
    """Hold as many connections as the flags say; returns the report."""
    report, tally = PartResult("connections"), Tally()
    with soaked(args, folder) as server:
        # Not before: the server would inherit it.
        _allow_files(args.connections + 500)
        most = asyncio.run(_besiege(server, args, tally))
        slowest = max(tally.health, default=float("inf"))
        late = sum(seconds > HEALTH_S for seconds in tally.health)
        report.promise(
            f"/health answers within {HEALTH_S:.0f} s",
            f"{late} of {len(tally.health)} late, slowest {slowest:.2f} s",
            late == 0 and tally.health_missed == 0,
        )
        report.promise(
            "well-behaved clients get the right answers",
            f"{len(tally.wrong)} of {tally.right + len(tally.wrong)} do not",
            tally.right > 0 and not tally.wrong,
        )
        server.judge(report, args.hold)
    report.figures |= {
        "most_open": most,
        "opened": dict(tally.opened),
        "refused": tally.refused,
        "health_p50_s": percentile(tally.health, 0.5),
        "health_p99_s": percentile(tally.health, 0.99),
        "health_slowest_s": slowest,
        "health_missed": tally.health_missed,
        "answer_p50_s": percentile(tally.seconds, 0.5) if tally.seconds else None,
        "answer_p99_s": percentile(tally.seconds, 0.99) if tally.seconds else None,
        "wrong": tally.wrong[:20],
    }
    print(
        f"connections: {sum(tally.opened.values()):,} opened, at most {most:,} at a time; /health "
        f"p50 {report.figures['health_p50_s']:.3f} s, p99 {report.figures['health_p99_s']:.3f} s"
    )
    return report


def _allow_files(number: int) -> None:
    """Allow this process to have this many files open.

    Raises:
        SystemExit: the system does not permit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (-1, resource.RLIM_INFINITY) and hard < number:
        raise SystemExit(f"--connections needs {number} open files, ulimit -Hn allows {hard}")
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
