"""The form of figures: verdicts, what is printed, what is written and read again."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

import pytest
from catalogue import CATALOGUE
from figures import Figure, FigureTable, number, read_figures, writable

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.parametrize(
    ("value", "bound", "better", "passed"),
    [
        (0.9, 0.9, "higher", True),
        (0.89, 0.9, "higher", False),
        (1.05, 1.05, "lower", True),
        (1.06, 1.05, "lower", False),
        (1.0, None, "higher", None),
        (20.0, None, None, None),
    ],
)
def test_whether_a_bound_is_reached(value, bound, better, passed):
    figure = Figure(name="speed", value=value, bound=bound, better=better)
    assert figure.passed is passed
    assert ("yes" in str(figure), "NO" in str(figure)) == (passed is True, passed is False)


def test_a_bound_without_a_direction_is_refused():
    with pytest.raises(ValueError, match="speed: a figure with a bound is better higher or lower"):
        Figure(name="speed", value=1.0, bound=1.0, better=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_was_not_measured_is_refused(value):
    with pytest.raises(ValueError, match="is no finite number"):
        Figure(name="speed", value=value)


def test_a_table_is_printed_and_written_and_read_again(tmp_path, capsys):
    table = FigureTable(batch=8)
    table.add("speed over full", [1.0, 4.0, 2.0, 3.0, 10.0], 3.0, 3.5, "of five rounds")
    table.context["dtype"] = "bf16"
    table.add("memory", 1.03, 1.02, better="lower")
    table.add("speed", 1234.5, unit="tokens/s", better=None)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "speed over full 3 x limit 3.500 quartiles 2 to 4 at least 3: yes of five rounds",
        "memory 1.030 x at most 1.020: NO",
        "speed 1,234 tokens/s",
    ]
    path = tmp_path / "figures.json"
    assert table.finish(path, {"rounds": 5}) == 1
    assert "1 of the bounds do not hold" in capsys.readouterr().err
    assert read_figures(path) == table.figures
    assert [one.setting for one in table.figures] == [{"batch": 8}, *2 * [third_setting()]]
    record = json.loads(path.read_text())
    assert [one["passed"] for one in record["figures"]] == [True, False, None]
    assert record["details"] == {"rounds": 5}
    assert record["machine"]["cores"] >= 1
    assert len(record["software"]["lock"]) == 64
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def third_setting() -> dict[str, object]:
    return {"batch": 8, "dtype": "bf16"}


def test_the_status_is_0_where_all_bounds_hold():
    table = FigureTable()
    table.add("speed", 1.0, 0.9)
    table.add("memory", 1.0)
    assert table.finish(None) == 0


def test_figures_that_could_not_be_told_apart_are_refused():
    table = FigureTable(batch=1)
    table.add("speed", 1.0)
    with pytest.raises(ValueError, match="two figures speed"):
        table.add("speed", 2.0)
    table.context["batch"] = 8
    table.add("speed", 2.0)
    assert len({figure.key for figure in table.figures}) == 2


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    assert writable(f"{tmp_path}/a.json") == tmp_path / "a.json"
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder, allowed: a file"):
        writable(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="there is no folder"):
        writable(f"{tmp_path}/none/a.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"figures": [{"name": "speed"}]}', '{"figu'])
def test_files_without_figures_are_refused(tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"figures\.json has no figures of a benchmark"):
        read_figures(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0134, "0.013"), (1.0187, "1.019"), (35.62, "35.6"), (9540.2, "9,540")],
)
def test_numbers_as_people_read_them(value, text):
    assert number(value) == text


@pytest.mark.parametrize("benchmark", CATALOGUE, ids=lambda one: one.name)
def test_flags_of_the_catalogue_are_those_of_the_scripts(benchmark):
    tree = ast.parse((BENCHMARKS / benchmark.script).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    calls = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {"FigureTable", "add_json_flag"} <= calls
    arguments = [*benchmark.arguments(False), *benchmark.arguments(True)]
    flags = {one.replace("--no-", "--") for one in arguments if one.startswith("--")}
    assert flags <= texts
