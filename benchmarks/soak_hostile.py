"""The part of `soak.py` with hostile requests.

Clients send wild values for every field of the OpenAPI document, bodies that are not JSON and bytes
that are not HTTP, and disconnect at any moment; between them, valid requests have to get the
answers that they get alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_requests import Item
from soak_report import PartResult, ProgressLine
from soak_server import GROWTH, Soaked, soaked
from soak_values import BODIES, Endpoint, endpoints, no_http, other_method, request

SIDE_BY_SIDE = 8
GOOD_EVERY = 10
PATIENCE_S = 60.0
"""For the answer to a request that is well-formed; for what is no HTTP, until it is let alone."""
_NO_HTTP_S = 2.0
_MOST_BYTES = 4 * 2**20
_OF_HTTP = frozenset({501, 505})
"""What HTTP provides for requests that are known for what is not done."""
_JUDGED_REQUESTS = 2000
_KINDS = ("fields",) * 9 + ("no HTTP",) * 4 + ("method",) * 2 + ("goes away",) * 3


@dataclass
class Tally:
    """The results of all requests so far."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    undocumented: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    shapeless: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    good: int = 0


def status_of(answer: bytes) -> int | None:
    """Of HTTP; None where the answer is none."""
    words = answer[:40].split(b" ", 2)
    is_http = words[0].startswith(b"HTTP/1.") and len(words) > 1
    return int(words[1]) if is_http and words[1][:3].isdigit() else None


async def send(soaked: Soaked, sent: bytes, patience_s: float, leave_after: int | None) -> bytes:
    """Send bytes and read the response, until the server closes or enough bytes have arrived."""
    answer = b""
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(soaked.host, soaked.port)
            try:
                writer.write(sent)
                await writer.drain()
                while len(answer) < (_MOST_BYTES if leave_after is None else leave_after):
                    part = await reader.read(65536)
                    if not part:
                        break
                    answer += part
            finally:
                writer.close()
    except (OSError, TimeoutError):
        pass
    return answer


async def _attack(
    soaked: Soaked, random_: random.Random, found: list[Endpoint], tally: Tally
) -> None:
    """Send one request and judge its answer."""
    kind, endpoint = random_.choice(_KINDS), random_.choice(found)
    how = random_.choice(tuple(BODIES))
    if kind == "fields":
        how = random_.choice(("wild fields", "wild fields", "wild fields", how))
    tally.kinds[f"{kind}: {how}" if kind == "fields" else kind] += 1
    if kind == "goes away":
        whole = request(endpoint.path, json.dumps(endpoint.good | {"stream": True}).encode())
        cut = random_.randrange(1, len(whole) + 1)
        await send(soaked, whole[:cut], random_.uniform(0, 0.5), random_.randrange(400))
        return
    if kind == "no HTTP":
        answer = await send(soaked, no_http(random_, endpoint), _NO_HTTP_S, None)
        status = status_of(answer)
        if status is not None:
            tally.statuses[status] += 1
            if status >= 500 and status not in _OF_HTTP | {503}:
                tally.undocumented.append(f"{kind}: {answer[:300]!r}")
        return
    if kind == "method":
        sent = other_method(random_, endpoint)
    else:
        sent = request(endpoint.path, BODIES[how](random_, endpoint))
    answer = await send(soaked, sent, PATIENCE_S, None)
    status = status_of(answer)
    if status is None:
        tally.unanswered.append(f"{sent[:600]!r} -> {answer[:100]!r}")
        return
    tally.statuses[status] += 1
    allowed = endpoint.statuses | {200} if kind == "fields" else frozenset({*range(200, 500), 503})
    # The model of this part has finite numbers only: an error of its own is one of the server's.
    if status not in allowed or status == 500:
        tally.undocumented.append(f"{status}: {sent[:600]!r} -> {answer[:400]!r}")
    if kind == "fields" and status >= 400 and not _is_error(answer):
        tally.shapeless.append(f"{sent[:600]!r} -> {answer[:400]!r}")


def _is_error(answer: bytes) -> bool:
    """Whether a refusal has the shape that the OpenAPI document says."""
    body = answer.partition(b"\r\n\r\n")[2]
    try:
        return bool(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


async def _ask(soaked: Soaked, random_: random.Random, tally: Tally) -> None:
    question = random_.choice(soaked.questions)
    record = await soaked.ask(Item(question, random_.random() < 0.5, None))
    tally.good += 1
    if not record.is_right():
        tally.wrong.append(f"{record.status} {b''.join(record.parts)[:300]!r}")


async def _attack_all(
    soaked: Soaked, args: argparse.Namespace, found: list[Endpoint], tally: Tally
) -> None:
    progress = ProgressLine("hostile", args.requests, "requests")
    numbers = iter(range(args.requests))

    async def work() -> None:
        for number in numbers:
            # Of its own number, so that what comes of one does not change the others.
            random_ = random.Random(f"{args.seed} {number}")
            await _attack(soaked, random_, found, tally)
            if number % GOOD_EVERY == 0:
                await _ask(soaked, random_, tally)
            faults = len(tally.undocumented) + len(tally.unanswered) + len(tally.shapeless)
            progress.tell(number + 1, f"{faults} faults, {len(tally.wrong)} wrong")

    async with soaked.watched(), asyncio.TaskGroup() as group:
        for _ in range(SIDE_BY_SIDE):
            group.create_task(work())


def run_hostile(args: argparse.Namespace, folder: Path) -> PartResult:
    """Send as many requests as the flags say; returns the report."""
    report, tally = PartResult("hostile"), Tally()
    with soaked(args, folder) as server:
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=30) as response:
            document: dict[str, Any] = json.load(response)
        found = endpoints(document)
        report.promise(
            "every endpoint of the document is attacked",
            f"{len(found)} endpoints, {sum(len(one.fields) for one in found)} fields",
            len(found) >= 5 and all(one.fields for one in found),
        )
        asyncio.run(_attack_all(server, args, found, tally))
        for text, faults in (
            ("every status is one that the document names", tally.undocumented),
            ("every request that is HTTP gets an answer", tally.unanswered),
            ("every refusal has an error with a message", tally.shapeless),
        ):
            report.promise(text, f"{len(faults)} of {args.requests:,} not", not faults)
        report.promise(
            "valid requests between them get the right answers",
            f"{len(tally.wrong)} of {tally.good:,} do not",
            tally.good > 0 and not tally.wrong,
        )
        is_long = args.requests >= _JUDGED_REQUESTS
        server.judge(report, float("inf") if is_long else 0.0)
    report.figures |= {
        "kinds": dict(tally.kinds),
        "statuses": {str(status): n for status, n in sorted(tally.statuses.items())},
        "good": tally.good,
        "growth_bound": GROWTH,
        "undocumented": tally.undocumented[:20],
        "unanswered": tally.unanswered[:20],
        "shapeless": tally.shapeless[:20],
        "wrong": tally.wrong[:20],
    }
    for fault in (*tally.undocumented[:3], *tally.unanswered[:3], *tally.shapeless[:3]):
        print(f"hostile: {fault}")
    return report
