"""A patch of something that has moved is an error, whichever of its names it is."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit import patches
from tests.helpers.speed import patient

ROOT = Path(__file__).resolve().parents[3]
NOT_NAMES = {"messages", "replace"}


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, str, str, str | None]]:
    """What the patches say of each name that is broken: module, name, how, error."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.moved_names"]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=patient(200), check=False
    )
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.splitlines()[-1])


def test_moved_names_are_errors(answers) -> None:
    assert len(answers) > 100
    for module, name, way, error in answers:
        case = f"{name} of {module} {way}: {error}"
        assert error is not None, case
        assert f".{name} is " in error, case
        assert error.endswith("this version of torch or Megatron is not supported"), case


def test_every_file_of_the_room_is_tried(answers) -> None:
    files = {module.name for module in pkgutil.iter_modules(patches.__path__)}
    tried = {module.rpartition(".")[2] for module, *_ in answers}
    assert tried == files - NOT_NAMES
