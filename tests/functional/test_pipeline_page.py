"""docs/pipeline.md says what its commands print."""

import json
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks import pipeline_paper
from megatron.early_exit.training.cli.arguments import add_early_exit_arguments
from tools import plan_pipeline, profile_layers

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pipeline.md").read_text()
BLOCKS = re.findall(r"^```console\n\$ python (\S+) ?(.*)\n((?:.*\n)*?)```", TEXT, re.MULTILINE)
(MEASURED,) = re.findall(r"^```console measured\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "tools/plan_pipeline.py": plan_pipeline.main,
    "tools/profile_layers.py": profile_layers.main,
    "benchmarks/pipeline_paper.py": pipeline_paper.main,
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


def without_figures(text: str) -> list[list[str]]:
    """Words of the lines that are the same on all machines, with a # for each number: neither what
    the machine is, nor plans, nor their flags."""
    machine = re.compile(r"(?<=^profile.json): .*|(?<=^times measured) .* on .*")
    lines = [machine.sub("", line) for line in text.strip().splitlines()]
    kept = [line for line in lines if not re.match(r" *\d|    --", line)]
    return [re.sub(r"\d+", "#", line).split() for line in kept]


# The figures are not compared, so the model that is measured may be smaller.
SMALLER = {"--hidden-size 256": "--hidden-size 64", "--seq-length 256": "--seq-length 32"}


def test_commands_that_measure_print_lines_like_these(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ python (\S+) (.*)\n((?:(?!\$ ).*\n)*)", MEASURED, re.MULTILINE)
    assert [program for program, _, _ in commands] == [
        "tools/profile_layers.py",
        "tools/plan_pipeline.py",
    ]
    for program, words, expected in commands:
        for written, run in SMALLER.items():
            assert written in words
            words = words.replace(written, run)
        assert PROGRAMS[program](shlex.split(words)) == 0
        assert without_figures(capsys.readouterr().out) == without_figures(expected)


def test_exits_of_a_small_model_cost_what_is_there(capsys):
    (block,) = re.findall(r"^```bash\n(plan\(\).*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    function, _, calls = block.replace("\\\n", " ").partition("}\n")
    common = shlex.split(function)
    words = common[common.index("tools/plan_pipeline.py") + 1 : common.index("$@;")]
    steps = []
    for call in calls.splitlines():
        assert plan_pipeline.main([*words, *call.split()[1:], "--json"]) == 0
        steps.append(json.loads(capsys.readouterr().out)["plans"][0]["step_s"])
    whole, short = (f"{step / steps[0] - 1:.0%}".replace("%", " %") for step in steps[1:])
    assert f"{whole} for the 3B below, {short} with that vocabulary" in TEXT


def test_there_are_commands():
    assert len(BLOCKS) == 9


def test_flags_and_files_of_the_text_exist():
    parsers = plan_pipeline.build_parser(), profile_layers.build_parser()
    known = {word for one in parsers for action in one._actions for word in action.option_strings}
    training = add_early_exit_arguments(ArgumentParser())
    known |= {word for action in training._actions for word in action.option_strings}
    # Megatron's own, which the text explains, and that of a benchmark.
    known |= {"--use-tp-pp-dp-mapping", "--overlap-grad-reduce", "--leave-one-out"}
    known |= {"--pipeline-model-parallel-layout", "--save-interval", "--runs"}
    prose = re.sub(r"^```(?:.*\n)*?```", "", TEXT, flags=re.MULTILINE)
    assert set(re.findall(r"`(--[a-z0-9-]+)", prose)) <= known
    named = set(re.findall(r"`((?:megatron|tests|tools|benchmarks)/[\w./]+)`", prose))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
