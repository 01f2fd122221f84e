"""The part of `soak.py` with well-behaved clients, which pause, send requests, wait or disconnect.

They use all modes, streams, several texts per prompt, and scores of prompts. Every answer is
compared at once with the one that its request gets alone, so that only times have to be kept."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from time import perf_counter
from typing import Any

from serve_clients import Client, Record
from serve_requests import Item, Question, endless_items
from soak_report import PartResult, ProgressLine
from soak_server import Soaked, soaked

from megatron.early_exit.client.figures import percentile

SEVERAL, SCORED, ABANDONED = 0.1, 0.1, 0.03
"""Shares of the requests that ask for several texts, ask for scores only, or are abandoned."""
_WAVE_S = 120.0
"""Seconds of a wave: in one half clients never pause, so that the server is full, in the other all
do."""


@dataclass
class Tally:
    """The results of all requests so far."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count an answer, and whether it is the expected one."""
        self.statuses[record.status] += 1
        try:
            is_right = record.is_right()
        except (ValueError, KeyError, IndexError):
            is_right = False
        if not is_right:
            answer = b"".join(record.parts)[:500]
            self.wrong.append(f"{record.status} {record.item.question.body!r}: {answer!r}")
        self.left += record.is_cancelled
        if record.times:
            self.seconds.append(record.times[-1] - record.begin)
            if record.item.is_streamed:
                self.firsts.append(record.times[0] - record.begin)


def with_others(questions: Sequence[Question], scored: Sequence[Question]) -> list[Question]:
    """The requests, including those for several texts and for scores, in their shares."""
    several = [
        replace(one, n=n, body=json.dumps({**json.loads(one.body), "n": n}).encode())
        for n, one in zip((2, 3, 4) * len(questions), questions, strict=False)
    ]
    whole = len(questions) / (1 - SEVERAL - SCORED)
    chosen = random.Random(0)
    return [
        *questions,
        *chosen.choices(several, k=round(SEVERAL * whole)),
        *chosen.choices(scored, k=round(SCORED * whole)),
    ]


async def score(soaked: Soaked) -> list[Question]:
    """Questions for the scores of prompts, answered by the server while it has nothing else."""
    scored = []
    for one in soaked.questions[::8]:
        body: dict[str, Any] = {"prompt": one.prompt, "max_tokens": 0, "echo": True}
        body |= {"logprobs": 1, "temperature": 0, "mode": "full"}
        question = Question(one.prompt, one.params, json.dumps(body).encode(), one.prompt)
        record = await soaked.ask(Item(question, is_streamed=False, cancel_after=None))
        answer = json.loads(b"".join(record.parts))
        if record.status != 200:
            raise SystemExit(f"the server does not score: {answer}")
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        scored.append(replace(question, logprobs=tuple(logprobs)))
    return scored


async def _live(
    soaked: Soaked,
    items: Iterator[Item],
    tally: Tally,
    random_: random.Random,
    think_s: float,
    until: float,
) -> None:
    client = Client(soaked.host, soaked.port)
    while perf_counter() < until:
        if perf_counter() % _WAVE_S > _WAVE_S / 2 and think_s:
            await asyncio.sleep(random_.expovariate(1 / think_s))
        item = next(items)
        if item.question.logprobs is not None:
            item = replace(item, is_streamed=False, cancel_after=None)
        record = Record(item)
        if not item.is_streamed and random_.random() < ABANDONED:
            tally.left += 1
            try:
                async with asyncio.timeout(random_.uniform(0, 0.5)):
                    await client.ask(record)
                tally.add(record)
            except TimeoutError:
                client.close()
            continue
        await client.ask(record)
        tally.add(record)
    client.close()


async def _live_together(soaked: Soaked, args: argparse.Namespace, tally: Tally) -> None:
    questions = with_others(soaked.questions, await score(soaked))
    items = endless_items(questions, args.seed)
    random_ = random.Random(args.seed)
    begin = perf_counter()
    progress = ProgressLine("clients", args.seconds, "seconds")

    async def tell() -> None:
        while True:
            await asyncio.sleep(1)
            note = f"{sum(tally.statuses.values()):,} answers, {len(tally.wrong)} wrong"
            progress.tell(perf_counter() - begin, note)

    teller = asyncio.create_task(tell())
    try:
        async with soaked.watched(), asyncio.TaskGroup() as group:
            for _ in range(args.clients):
                until = begin + args.seconds
                group.create_task(_live(soaked, items, tally, random_, args.think, until))
    finally:
        teller.cancel()


def run_clients(args: argparse.Namespace, folder: Path) -> PartResult:
    """Load a server for as long as the flags say; returns the report."""
    report, tally = PartResult("clients"), Tally()
    with soaked(args, folder) as server:
        asyncio.run(_live_together(server, args, tally))
        others = {status: n for status, n in tally.statuses.items() if status != 200}
        number = sum(tally.statuses.values())
        found = f"{len(tally.wrong)} of {number:,}, {tally.left:,} left early"
        report.promise("every answer equals the one its request gets alone", found, not tally.wrong)
        report.promise("every status is 200", others or "yes", number > 0 and not others)
        server.judge(report, args.seconds)
    report.figures |= {
        "requests": number,
        "left_early": tally.left,
        "statuses": dict(tally.statuses),
        "wrong": tally.wrong[:20],
        "answer_p50_s": _rank(tally.seconds, 0.5),
        "answer_p99_s": _rank(tally.seconds, 0.99),
        "first_token_p50_s": _rank(tally.firsts, 0.5),
        "first_token_p99_s": _rank(tally.firsts, 0.99),
    }
    f = report.figures
    print(
        f"clients: time to first token p50 {f['first_token_p50_s']} s, p99 "
        f"{f['first_token_p99_s']} s; whole answers p50 {f['answer_p50_s']} s, p99 "
        f"{f['answer_p99_s']} s"
    )
    return report


def _rank(values: list[float], share: float) -> float | None:
    found = percentile(values, share) if values else float("nan")
    return None if isnan(found) else round(found, 3)
