"""The README is followed word for word, in a copy of the repository."""

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.speed import patient

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Running the tests from a test would not end.
NOT_RUN = ("make test\n",)
# A demo of a few steps: its figures do not matter here, README's come from the full one.
ENVIRONMENT = {**os.environ, "DEMO_STEPS": "12", "DEMO_MINUTES": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the working tree, with the environment that the tests themselves run in."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def as_run(kind: str, text: str) -> list[str]:
    if kind == "python":
        return [".venv/bin/python", "-c", text]
    # The environment is the test's own; to set it up again takes minutes and a network.
    return ["bash", "-euo", "pipefail", "-c", re.sub(r"^make ", "make -o setup ", text, flags=re.M)]


@pytest.mark.timeout(patient(600))
def test_every_command_of_the_readme_works(clone):
    blocks = [block for block in BLOCK.findall(README) if block[1] not in NOT_RUN]
    assert len(blocks) >= 4
    for kind, text in blocks:
        done = subprocess.run(
            as_run(kind, text),
            cwd=clone,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patient(400),
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr, text
    for name in ("losses.png", "tradeoff.png", "tradeoff.json"):
        assert (clone / "demo" / name).stat().st_size > 200, name


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:megatron|tools|examples|benchmarks|tests)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert len(named) > 8
    missing = sorted(name for name in named if not (REPOSITORY / name).exists())
    assert not missing


def test_every_flag_of_the_exits_is_in_the_readme():
    from megatron.early_exit.training.cli.arguments import add_early_exit_arguments

    parser = add_early_exit_arguments(argparse.ArgumentParser(add_help=False))
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert {"--exit-layer-nums", "--tune-exit", "--fill-explicit-bubbles"} < set(flags)
    assert [flag for flag in flags if f"`{flag}`" not in README] == []
