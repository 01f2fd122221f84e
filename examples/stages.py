"""Building blocks of the examples' scripts: stages, short commands, and long commands whose log is
summarised in a line now and then."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron.early_exit.process_family import started

REPOSITORY = Path(__file__).resolve().parents[1]

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) ")
_VALUE = re.compile(r"(lm loss|(?:exit|mtp) \d+ (?:loss|accuracy)): ([0-9.E+-]+)")
_PROGRESS = re.compile(r"progress: .*\| (.*tokens/s) \| time left (\S+)")
_LAST_LINES = 30


def stage(title: str, work: Callable[[], None]) -> None:
    """Run one stage and print how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    work()
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def run_command(*command: str) -> None:
    """Run a command in the repository's root and print its last line.

    Raises:
        SystemExit: it failed.
    """
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{result.stdout}{result.stderr}\nerror: {' '.join(command[1:3])} failed")
    print("   " + result.stdout.strip().splitlines()[-1], flush=True)


def follow_training(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run the training's entry point in the repository's root; print a line of progress now and
    then; keep the whole log.

    Raises:
        SystemExit: it failed; the end of its log is printed.
    """
    lines: list[str] = []
    with (
        log.open("w") as file,
        started(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        printer = _ProgressPrinter()
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            printer.take(line)
        process.wait()
    if process.returncode != 0:
        sys.stderr.writelines(lines[-_LAST_LINES:])
        raise SystemExit(f"error: training failed, its log is {log}")


class _ProgressPrinter:
    """Turns Megatron's log into short lines, at most one every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._summary = ""
        self._is_last = False
        self._printed = -seconds

    def take(self, line: str) -> None:
        if found := _ITERATION.search(line):
            done, total = found.groups()
            values = " | ".join(
                f"{name} {float(value):.3f}" for name, value in _VALUE.findall(line)
            )
            self._summary = f"  step {done}/{total} | {values}"
            self._is_last = done == total
        elif (found := _PROGRESS.search(line)) and self._summary:
            now = time.monotonic()
            if now - self._printed >= self.seconds or self._is_last:
                print(f"{self._summary} | {found[1]} | {found[2]} left", flush=True)
                self._printed = now
