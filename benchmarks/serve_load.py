"""Measure how much of the engine's speed the HTTP server keeps, and whether it is stable under
load.

    python benchmarks/serve_load.py [--model small] [--load DIR] [--seconds 300] [--clients 64]

The command starts a server and many clients, which send requests without a pause: prompts and
    answers of several lengths, all modes, half of the answers as streams, in a fifth of which the
    client disconnects in the middle. Alternately with that, the engine answers the very same
    requests without a server, with the same concurrency. Each answer has to be equal to the one
    that its request gets alone, and the server's memory must not grow. Each figure is printed with
    its bound. With --url the clients use a running server, whose checkpoint has to be given with
    --load.
"""

import argparse
import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import torch
from figures import FigureTable, add_json_flag
from serve_clients import Record, load
from serve_models import SIZES, make_checkpoint
from serve_process import Memory, health, listener, served
from serve_requests import Item, answer_all, endless_items, make_questions

from megatron.early_exit.client.figures import percentile
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.process_family import run_program

THROUGHPUT_BOUND = 0.9
GROWTH_BOUND = 0.03
"""Allowed growth of the server's memory, from the middle third of the time to the last."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=tuple(SIZES), default="small", help="model with random weights to serve")
    add("--load", type=Path, help="checkpoint to serve instead; it needs a tokenizer")
    add("--url", help="address of a running server that needs no key")
    add("--seconds", type=float, default=300.0, help="seconds of load (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that the load is divided into")
    add("--clients", type=int, default=64, help="number of clients (default: %(default)s)")
    add("--max-batch-size", type=int, default=16, help="of server and engine (default: 16)")
    add(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 1),
        help="threads of the server, and of the engine alone (default: all cores but one)",
    )
    add_json_flag(parser)
    args = parser.parse_args()
    if args.url is not None and args.load is None:
        parser.error("--url needs --load, the checkpoint that is served there")
    return args


@dataclass
class Turn:
    """One round of the server, and of the engine with the same requests."""

    records: list[Record]
    seconds: float
    engine_seconds: float
    client_cpu: float
    """Seconds of the clients' process."""
    server_cpu: float
    engine_cpu: float


def take_turn(
    url: str,
    items: Iterator[Item],
    args: argparse.Namespace,
    engine: EarlyExitEngine,
    memory: Memory,
) -> Turn:
    """Load the server for its share of the time, and give the same requests to the engine."""
    place = urlsplit(url)
    host = place.hostname
    assert host is not None

    async def watched() -> tuple[list[Record], float]:
        watcher = asyncio.create_task(memory.watch())
        try:
            clients = args.clients, args.seconds / args.rounds
            return await load(host, place.port or 80, items, *clients)
        finally:
            watcher.cancel()

    before, own = sum(memory.process.cpu_times()[:2]), time.process_time()
    records, seconds = asyncio.run(watched())
    own, used = time.process_time() - own, sum(memory.process.cpu_times()[:2]) - before
    before = time.process_time()
    engine_seconds = answer_all(engine, [record.as_answered() for record in records], args.clients)
    return Turn(records, seconds, engine_seconds, own, used, time.process_time() - before)


def figures_of(turns: list[Turn], memory: Memory) -> dict[str, Any]:
    """All that was found."""
    records = [record for turn in turns for record in turn.records]
    seconds = sum(turn.seconds for turn in turns)
    streams = [one for one in records if one.item.is_streamed and one.times]
    firsts = [one.times[0] - one.begin for one in streams]
    gaps = [gap for one in streams for gap in one.gaps]
    return {
        "requests": len(records),
        "cancelled": sum(one.is_cancelled for one in records),
        "statuses": dict(Counter(one.status for one in records)),
        "wrong": sum(not one.is_right() for one in records),
        "tokens_per_second": sum(one.num_tokens for one in records) / seconds,
        "by_turn": [turn.engine_seconds / turn.seconds for turn in turns],
        "first_token_p50_s": percentile(firsts, 0.5),
        "first_token_p99_s": percentile(firsts, 0.99),
        "between_tokens_p50_s": percentile(gaps, 0.5),
        "between_tokens_p99_s": percentile(gaps, 0.99),
        "client_cpu": sum(turn.client_cpu for turn in turns) / seconds,
        "server_cpu": sum(turn.server_cpu for turn in turns) / seconds,
        "engine_cpu_over_server": median(turn.engine_cpu / turn.server_cpu for turn in turns),
        **memory.figures(),
    }


def show(found: dict[str, Any], args: argparse.Namespace) -> FigureTable:
    """Print what a run found; returns its figures with their bounds."""
    f = found
    print(
        f"{f['requests']} requests, {f['cancelled']} of them left in mid-stream\n"
        f"CPU: clients {f['client_cpu']:.0%} of a core, server {f['server_cpu']:.0%}"
    )
    table = FigureTable(
        model=args.load.name if args.load else args.model,
        clients=args.clients,
        max_batch_size=args.max_batch_size,
        threads=args.threads,
    )
    speed = f["tokens_per_second"]
    table.add("speed of the server", speed, unit="tokens/s", better=None)
    for name, key in (("time to first token", "first_token"), ("between tokens", "between_tokens")):
        for share in ("p50", "p99"):
            milliseconds = 1e3 * f[f"{key}_{share}_s"]
            # Of no answer there is no time.
            if not math.isnan(milliseconds):
                table.add(f"{name}, {share}", milliseconds, unit="ms", better=None)
    others = {status: n for status, n in f["statuses"].items() if status != 200}
    for name, count, note in (
        ("wrong or lost answers", f["wrong"], ""),
        ("statuses but 200", sum(others.values()), str(others or "")),
        # A server that does not answer has kept one at least.
        ("requests left in the server", 1 if f["left"] is None else f["left"], ""),
    ):
        table.add(name, count, 0, note=note, unit="requests", better="lower")
    table.add(
        "memory of the server, last third over middle third",
        1 + f["memory_growth"],
        1 + GROWTH_BOUND,
        1.0,
        f"{f['memory_middle_mib']:.0f} -> {f['memory_last_mib']:.0f} MiB, "
        f"{f['memory_slope_mib_per_minute']:+.1f} MiB a minute",
        better="lower",
    )
    table.add("CPU time of the engine alone over the server's", f["engine_cpu_over_server"])
    name = "throughput of the server over the engine alone"
    table.add(name, f["by_turn"], THROUGHPUT_BOUND, 1.0)
    return table


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.set_num_threads(args.threads)
        checkpoint = args.load or make_checkpoint(args.model, folder)
        engine = EarlyExitEngine.from_checkpoint(
            checkpoint, max_batch_size=args.max_batch_size, use_stored_rule=False
        )
        questions = make_questions(engine)
        with (
            contextlib.nullcontext(args.url.rstrip("/"))
            if args.url
            else served(checkpoint, folder, args.max_batch_size, args.threads)
        ) as url:
            memory = Memory(listener(urlsplit(url).port or 80))
            items = endless_items(questions, seed=1)
            turns = [take_turn(url, items, args, engine, memory) for _ in range(args.rounds)]
            time.sleep(1)
            last = health(url)
    figures = figures_of(turns, memory)
    figures["left"] = (
        None if last is None else last["num_requests_running"] + last["num_requests_waiting"]
    )
    return show(figures, args).finish(args.json, figures)


if __name__ == "__main__":
    sys.exit(run_program(main))
