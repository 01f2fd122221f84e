"""Runs scripts of examples/ and parses the commands that they print."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.speed import patient

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "pretrain_early_exit_gpt.py"
PATHS = ("DATA_PATH", "TOKENIZER_MODEL", "CHECKPOINT_DIR", "TENSORBOARD_DIR")
TIMEOUT_S = patient(280)  # several times what a dry run takes on two free cores

_OWN_VARIABLES = re.compile(
    r"BASE_DIR|DATA_PATH|TOKENIZER_.*|CHECKPOINT_DIR|TENSORBOARD_DIR|GPUS_PER_NODE|NNODES"
    r"|NODE_RANK|MASTER_.*|SLURM_.*|DRY_RUN|PRINT_ONLY|CUDA_VISIBLE_DEVICES"
)

Flags = dict[str, tuple[str, ...]]

_RECORDER = """#!/bin/bash
for word in "$@"; do printf '%s\\0' "$word"; done >>"$RECORD"
printf '\\n' >>"$RECORD"
"""
"""A script that replaces Python and records its arguments."""


@dataclass(frozen=True)
class ExampleScripts:
    """The scripts of one folder.

    Attributes:
        folder: the folder of the scripts.
        places: flags whose values are other folders in a dry run.
    """

    folder: Path
    places: frozenset[str]

    def run(self, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script; of the variables that it reads, only those in `environment` are set."""
        inherited = {k: v for k, v in os.environ.items() if not _OWN_VARIABLES.fullmatch(k)}
        process = subprocess.Popen(
            [self.folder / script, *flags],
            env=inherited | {"PYTHON": sys.executable} | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                # The whole group: torchrun, told so, ends its workers.
                os.killpg(process.pid, signal.SIGTERM)
                process.communicate(timeout=patient(60))
        return subprocess.CompletedProcess(script, process.returncode, stdout, stderr)

    def recorded_dry_run(self, script: str, folder: Path) -> list[list[str]]:
        """The arguments of the Python commands that a dry run starts, after which its files are
        deleted."""
        recorder, record, scratch = folder / "python", folder / "record", folder / "tmp"
        recorder.write_text(_RECORDER)
        recorder.chmod(0o755)
        scratch.mkdir()
        variables = {"TMPDIR": str(scratch), "RECORD": str(record)}
        done = self.run(script, PYTHON=str(recorder), DRY_RUN="1", **variables)
        assert done.returncode == 0, done.stderr
        assert list(scratch.iterdir()) == []
        return [line.split("\0")[:-1] for line in record.read_text().splitlines()]

    def printed(self, script: str, *flags: str, **environment: str) -> tuple[Flags, Flags, str]:
        """What a script would run: the flags of torchrun, those of the training, and the script's
        messages."""
        process = self.run(script, *flags, PRINT_ONLY="1", **environment)
        assert process.returncode == 0, process.stderr
        return *parse(process.stdout), process.stderr

    def refused(self, script: str, *flags: str, **environment: str) -> list[str]:
        """The problems that a script reports; it has to report at least one."""
        process = self.run(script, *flags, PRINT_ONLY="1", **environment)
        assert (process.returncode, process.stdout) == (2, "")
        lines = process.stderr.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    def assert_dry_run_says_what_it_replaces(
        self, script: str, paths: dict[str, str]
    ) -> tuple[Flags, str]:
        """Check that a dry run has the flags of the real run, except those that it replaces.

        Returns:
            The flags of torchrun, and the script's messages.
        """
        _, real, remarks = self.printed(script, **paths)
        assert remarks == ""
        torchrun, dry, remarks = self.printed(script, DRY_RUN="1")
        said = dict(re.findall(r"^dry run: (--[a-z-]+) (\S+ -> \S+)$", remarks, re.MULTILINE))
        changed = {
            flag: f"{real[flag][0]} -> {dry[flag][0]}"
            for flag in real.keys() & dry.keys()
            if real[flag] != dry[flag]
        }
        assert changed.pop("--tokenizer-type") == "SentencePieceTokenizer -> NullTokenizer"
        assert {f: change for f, change in changed.items() if f not in self.places} == said
        assert said.keys() >= {"--hidden-size", "--seq-length", "--train-iters"}
        assert changed.keys() >= self.places
        assert "temporary folder instead of CHECKPOINT_DIR and TENSORBOARD_DIR" in remarks
        assert real.keys() - dry.keys() == {"--data-path", "--tokenizer-model"}
        assert dry.keys() - real.keys() == {"--mock-data", "--vocab-size"}
        assert "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 instead of" in remarks
        return torchrun, remarks


def input_paths(folder: Path) -> dict[str, str]:
    """Values of the variables in `PATHS` that the checks accept."""
    for name in ("text.bin", "text.idx", "tokenizer.model"):
        (folder / name).touch()
    (folder / "out").mkdir(exist_ok=True)
    out = str(folder / "out")
    files = (f"{folder}/text", f"{folder}/tokenizer.model", out, out)
    return dict(zip(PATHS, files, strict=True))


def parse(command: str) -> tuple[Flags, Flags]:
    """The flags of torchrun and those of the training, of one printed command."""
    words = shlex.split(command.replace("\\\n", ""))
    entry = words.index(str(ENTRY))
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    return group(words[3:entry]), group(words[entry + 1 :])


def group(words: list[str]) -> Flags:
    """Flags and their values; a flag given twice keeps its last value, as in argparse."""
    flags: Flags = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            flags[flag] = ()
        else:
            flags[flag] += (word,)
    return flags


def table_rows(readme: Path, first_cell: str) -> list[list[str]]:
    """The cells after the first one of those rows of a README's tables that begin with
    `first_cell`."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.read_text().splitlines()
        if line.startswith("|")
    ]
    return [cells for first, *cells in rows if first == first_cell]
