"""docs/pipeline.md says what its commands print."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import pipeline_paper
from tools import plan_pipeline

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pipeline.md").read_text()
BLOCKS = re.findall(r"^```console\n\$ python (\S+) ?(.*)\n((?:.*\n)*?)```", TEXT, re.MULTILINE)
PROGRAMS = {
    "tools/plan_pipeline.py": plan_pipeline.main,
    "benchmarks/pipeline_paper.py": lambda _: pipeline_paper.main(),
}


@pytest.mark.parametrize(
    ("program", "flags", "expected"), BLOCKS, ids=[f"{p} {flags}" for p, flags, _ in BLOCKS]
)
def test_commands_print_what_is_there(program, flags, expected, tmp_path, capsys, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert PROGRAMS[program](shlex.split(flags)) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
    # Pictures are written, and are in the text.
    for path in tmp_path.rglob("*.svg"):
        assert f"]({path.name})" in TEXT
        assert (ROOT / path.relative_to(tmp_path)).read_text().startswith("<?xml")


def test_there_are_commands():
    assert len(BLOCKS) == 6


def test_flags_and_files_of_the_text_exist():
    known = {
        word for action in plan_pipeline.build_parser()._actions for word in action.option_strings
    }
    # Megatron's and the training's own, which the text explains.
    known |= {"--use-tp-pp-dp-mapping", "--overlap-grad-reduce"}
    prose = re.sub(r"^```(?:.*\n)*?```", "", TEXT, flags=re.MULTILINE)
    assert set(re.findall(r"`(--[a-z0-9-]+)", prose)) <= known
    named = set(re.findall(r"`((?:megatron|tests|tools|benchmarks)/[\w./]+)`", prose))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
