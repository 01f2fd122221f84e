"""The part of `soak.py` that kills training runs, which have to resume as if nothing had happened.

Victims and moments are chosen at random: all ranks at once, one rank, a worker of a rank, or
torchrun; while starting, between steps, in every phase of saving. A run that reaches its end is
compared with an undisturbed one, and then the next run begins."""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from soak_report import PartResult, ProgressLine

from megatron.early_exit import platform
from megatron.early_exit.process_family import MARK, members, started

platform.prepare()

from tests.helpers.killed_training import (  # noqa: E402
    LIFE_TIMEOUT_S,
    NPROC,
    PHASES,
    Moment,
    Training,
    after_a_step,
    at_once,
    during_a_save,
    flags,
)
from tests.helpers.training_runs import write_documents  # noqa: E402
from tests.helpers.warm_ranks import ROOT, Job, WarmRanks  # noqa: E402

GONE_S = 30.0
"""Seconds after a kill within which all processes of the run have to end."""
_START_S = {"warm": 4.0, "torchrun": 40.0}
"""Approximate seconds of a start, during which the kills of starting runs happen."""
_LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration +(\d+)")
_LEFT_IN_TMP = re.compile(r"torchelastic_.*|torchinductor_.*|pymp-.*|tmp[a-z0-9_]{8}(wandb-\w+)?")
"""Small files that torch, Python and W&B leave in the temporary folder when they are killed."""


class Life(Protocol):
    """One life of a training run: from a start to its end or a kill."""

    kind: str

    def poll(self) -> int | None:
        """The status, when all have ended or one has failed."""

    def kill(self, random_: random.Random) -> str:
        """Kill one or all processes; returns which. All processes have ended afterwards."""

    def output(self) -> str:
        """The output so far."""


@dataclass
class WarmLife:
    """Ranks that are forked from a warm process."""

    job: Job
    kind: str = "warm"

    def poll(self) -> int | None:
        return self.job.poll()

    def output(self) -> str:
        return self.job.output()

    def kill(self, random_: random.Random) -> str:
        victim = random_.choice(("all ranks", "a rank", "a worker"))
        if victim != "all ranks":
            with suppress(psutil.Error, IndexError):
                rank = psutil.Process(random_.choice(self.job.pids))
                one = rank if victim == "a rank" else random_.choice(rank.children(recursive=True))
                one.kill()
                _wait(lambda: self.job.poll() is not None, 5.0)
        self.job.kill()
        return victim


@dataclass
class TorchrunLife:
    """Torchrun and its ranks."""

    process: subprocess.Popen[Any]
    log: Path
    left: list[str] = field(default_factory=list)
    kind: str = "torchrun"

    def poll(self) -> int | None:
        return self.process.poll()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, random_: random.Random) -> str:
        victim = random_.choice(("torchrun", "a rank", "a worker"))
        torchrun = psutil.Process(self.process.pid)
        name = torchrun.environ()[MARK].split()[-1]
        ranks = torchrun.children()
        workers = [one for one in torchrun.children(recursive=True) if one not in ranks]
        chosen = {"torchrun": [torchrun], "a rank": ranks, "a worker": workers}[victim]
        if not chosen:
            victim, chosen = "torchrun", [torchrun]
        with suppress(psutil.Error):
            random_.choice(chosen).kill()
        if victim == "a worker":
            # Not everybody is missed at once.
            _wait(lambda: self.process.poll() is not None, 10.0)
            if self.process.poll() is None:
                self.process.kill()
        _wait(lambda: not members(name), GONE_S)
        for one in members(name):
            with suppress(psutil.Error):
                self.left.append(f"{victim} killed: {' '.join(one.cmdline())[:200]}")
        return victim


def _wait(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


@dataclass
class Killing:
    """The observations so far."""

    expected: dict[str, dict[int, set[float]]]
    victims: dict[str, int] = field(default_factory=dict)
    moments: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    finished: int = 0

    def compare(self, training: Training) -> None:
        """Check a training run that has reached its end."""
        self.finished += 1
        found = training.log()
        self.differing += [
            f"{training.folder.name}: {tag}"
            for tag in self.expected
            if found.get(tag) != self.expected[tag]
        ]
        self.unfinished += [
            str(one) for one in training.save.iterdir() if _is_unfinished(one, training.save)
        ]


def _is_unfinished(path: Path, save: Path) -> bool:
    """Whether a name in a checkpoint directory is one that no finished run may leave behind."""
    if path.name.startswith("iter_"):
        return not (path / "metadata.json").exists() or not (path / ".metadata").exists()
    return path.name.startswith((".", "tmp")) or path.suffix in (".tmp", ".part")


def run_kills(args: argparse.Namespace, folder: Path) -> PartResult:
    """Kill as often as the flags say; returns the report."""
    # It tells which file it reads.
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    random_ = random.Random(args.seed)
    scratch = folder / "tmp"
    scratch.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(scratch)
    try:
        with WarmRanks() as ranks:
            data = [*write_documents(folder), "--num-workers", 1]
            killing = _kill(args, folder, ranks, [*flags(args.steps), *data], random_)
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
    killing.unfinished += [
        str(one) for one in scratch.iterdir() if not _LEFT_IN_TMP.fullmatch(one.name)
    ]
    return _report(args, killing)


def _kill(
    args: argparse.Namespace,
    folder: Path,
    ranks: WarmRanks,
    training_flags: list[object],
    random_: random.Random,
) -> Killing:
    undisturbed = Training(ranks, folder / "undisturbed", training_flags)
    undisturbed.finish(0)
    killing = Killing(undisturbed.log())
    progress = ProgressLine("kills", args.kills, "kills")
    number, training = 0, Training(ranks, folder / "training-0", training_flags)
    # A life may end by itself before its moment comes.
    for life in range(3 * args.kills):
        if number == args.kills:
            break
        by_torchrun = number % args.torchrun_every == args.torchrun_every - 1
        with ExitStack() as stack:
            tracker = _tracker(training)
            one: Life
            if by_torchrun:
                one = _start_torchrun(stack, training, life)
            else:
                one = WarmLife(training.start(life))
            name, moment, delay_s = _choose_moment(random_, one.kind)
            status = _live_until(one, training, moment, delay_s)
            if status is None:
                number += 1
                victim = f"{one.kind}: {one.kill(random_)}"
                killing.victims[victim] = killing.victims.get(victim, 0) + 1
                killing.moments[name] = killing.moments.get(name, 0) + 1
            if isinstance(one, TorchrunLife):
                killing.left += one.left
            output = one.output()
        loaded = _LOADED.findall(output)
        if loaded and int(loaded[0]) < tracker:
            killing.behind.append(f"life {life}: {loaded[0]} of {tracker}")
        if status:
            if isinstance(one, WarmLife):
                one.job.kill()
            killing.failed.append(f"life {life} ({one.kind}): {output[-3000:]}")
            print(killing.failed[-1], file=sys.stderr, flush=True)
        if status == 0:
            killing.compare(training)
            training = Training(ranks, folder / f"training-{life + 1}", training_flags)
        progress.tell(number, f"{killing.finished} trainings finished, last killed at {name}")
    # The last one lives on.
    job = training.start(3 * args.kills)
    if job.wait(LIFE_TIMEOUT_S):
        killing.failed.append(f"last life: {job.output()[-3000:]}")
    else:
        killing.compare(training)
    return killing


def _start_torchrun(stack: ExitStack, training: Training, life: int) -> TorchrunLife:
    folder = training.folder / f"life-{life}"
    folder.mkdir(parents=True)
    training.started = time.time()
    # Where `after_a_step` looks; both ranks write there.
    log = folder / f"rank{NPROC - 1}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NPROC), *training.command()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    file = stack.enter_context(log.open("w"))
    process = stack.enter_context(
        started(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    )
    return TorchrunLife(process, log)


def _choose_moment(random_: random.Random, kind: str) -> tuple[str, Moment, float]:
    name = random_.choice(("start", "step", "step", "save", *PHASES))
    if name == "start":
        return name, at_once, random_.uniform(0, _START_S[kind])
    if name == "step":
        return name, after_a_step, random_.uniform(0, 1.0)
    return name, PHASES.get(name, during_a_save()), random_.choice((0.0, random_.uniform(0, 0.1)))


def _live_until(one: Life, training: Training, moment: Moment, delay_s: float) -> int | None:
    """Wait for a moment and some seconds; returns the status of a life that ends before it."""
    until = time.monotonic() + LIFE_TIMEOUT_S
    looked = time.monotonic()
    while not moment(training) and time.monotonic() < until:
        if time.monotonic() > looked + 0.5:
            if (status := one.poll()) is not None:
                return status
            looked = time.monotonic()
        time.sleep(0.0005)
    time.sleep(delay_s)
    return one.poll()


def _tracker(training: Training) -> int:
    """The iteration that the checkpoint directory names; 0 where there is none."""
    path = training.save / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else 0


def _report(args: argparse.Namespace, killing: Killing) -> PartResult:
    report = PartResult("kills")
    report.figures = {
        "victims": killing.victims,
        "moments": killing.moments,
        "finished_trainings": killing.finished,
        "failed": killing.failed,
        "behind": killing.behind,
        "differing": killing.differing,
        "unfinished": killing.unfinished,
        "left_processes": killing.left,
    }
    kills = sum(killing.victims.values())
    report.promise("as many kills as --kills", f"{kills} of {args.kills}", kills == args.kills)
    report.promise(
        "every killed run resumes, and none fails by itself",
        f"{len(killing.failed)} failed",
        not killing.failed,
    )
    report.promise(
        "none resumes from before the last checkpoint",
        f"{len(killing.behind)} did",
        not killing.behind,
    )
    report.promise(
        "all figures logged equal the undisturbed run's, bit for bit",
        f"{len(killing.differing)} differ, of {killing.finished} x {len(killing.expected)}",
        killing.finished > 0 and not killing.differing,
    )
    report.promise(
        f"no process is left {GONE_S:.0f} s after a kill",
        f"{len(killing.left)} left",
        not killing.left,
    )
    report.promise(
        "no file is left unfinished", f"{len(killing.unfinished)} left", not killing.unfinished
    )
    return report
