"""Test for hours whether training and the server keep their promises under kills and hostile load.

    python benchmarks/soak.py [--parts kills hostile clients connections] [--json FILE]

Each part has a server or training runs of its own on 127.0.0.1; --seed makes random choices
repeatable. The parts are
kills: training runs are killed at random moments, some under torchrun, others with ranks that are
forked from a process that has imported everything;
hostile: invalid requests;
clients: many well-behaved clients, which pause, disconnect, stream and score prompts;
connections: thousands of connections that send nothing, or a part of a request, or do not read.
The command ends with a table, and with status 1 if a promise was broken. Parts can run side by side
as separate commands.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import FigureTable, add_json_flag
from serve_models import SIZES
from soak_clients import run_clients
from soak_connections import run_connections
from soak_hostile import run_hostile
from soak_kills import run_kills
from soak_report import PartResult, table

from megatron.early_exit.process_family import run_program

PARTS: dict[str, Callable[[argparse.Namespace, Path], PartResult]] = {
    "kills": run_kills,
    "hostile": run_hostile,
    "clients": run_clients,
    "connections": run_connections,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    add_json_flag(parser)
    add("--model", choices=tuple(SIZES), default="tiny", help="model with random weights to serve")
    add("--max-batch-size", type=int, default=16, help="of the server (default: %(default)s)")
    add(
        "--threads",
        type=int,
        default=1,
        help="computing threads of the server (default: %(default)s)",
    )
    group = parser.add_argument_group("lengths")
    add = group.add_argument
    add("--kills", type=int, default=100, help="default: %(default)s")
    add("--torchrun-every", type=int, default=5, help="of the lives to kill (default: %(default)s)")
    add("--steps", type=int, default=60, help="of a training (default: %(default)s)")
    add("--requests", type=int, default=10_000, help="hostile requests (default: %(default)s)")
    add("--clients", type=int, default=64, help="default: %(default)s")
    add(
        "--seconds",
        type=float,
        default=3600.0,
        help="seconds of load by clients (default: %(default)s)",
    )
    add("--think", type=float, default=2.0, help="mean seconds of a client (default: %(default)s)")
    add("--connections", type=int, default=2000, help="default: %(default)s")
    add("--hold", type=float, default=120.0, help="seconds with all of them (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("kills", 1), ("torchrun_every", 1), ("steps", 6), ("requests", 10)):
        _check(parser, args, name, least)
    for name, least in (("clients", 1), ("seconds", 1), ("connections", 1), ("hold", 1)):
        _check(parser, args, name, least)
    _check(parser, args, "think", 0)
    return args


def _check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, least: int
) -> None:
    value = getattr(args, name)
    if value < least:
        flag = f"--{name.replace('_', '-')}"
        parser.error(f"{flag} {value} is out of range, allowed: {least} or more")


def main() -> int:
    """Run the parts; returns the exit status."""
    args = parse()
    reports = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        for part in args.parts:
            folder = Path(name) / part
            folder.mkdir()
            begin = time.monotonic()
            report = PARTS[part](args, folder)
            report.seconds = time.monotonic() - begin
            print(table([report]), flush=True)
            reports.append(report)
    broken = sum(len(report.broken) for report in reports)
    if len(reports) > 1:
        print(f"\n{table(reports)}")
    print(f"{broken} promises broken, in {sum(one.seconds for one in reports) / 60:.1f} minutes")
    figures = FigureTable()
    for report in reports:
        figures.context["part"] = report.name
        name, note = "broken promises", "; ".join(report.broken)
        figures.add(name, len(report.broken), 0, 0, note, unit="promises", better="lower")
    details = {
        "load_average": os.getloadavg(),
        "cores": os.cpu_count(),
        "flags": {k: v for k, v in vars(args).items() if k != "json"},
        "parts": {one.name: one.as_dict() for one in reports},
    }
    return figures.finish(args.json, details)


if __name__ == "__main__":
    sys.exit(run_program(main))
