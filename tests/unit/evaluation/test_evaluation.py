"""A whole evaluation: its files, and that a killed one goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron.early_exit.evaluation.evaluation import Evaluation
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.output import CURVE, RECORDS, REPORT, RESULTS, rebuild
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.units import Unit
from megatron.early_exit.inference import EarlyExitEngine
from tests.helpers.text_tokenizers import make_tokenizer
from tests.helpers.tiny_models import LLAMA, make_model

SCRIPT = "</script><script>alert(1)</script> @data@"
ITEMS = (Item("code", f"def {SCRIPT}", "main"), Item("prose", "a list", "of spaces"))
SETTINGS = Settings(
    tasks=("code", "prose"),
    thresholds=(1.0, 0.3),
    measures=("max_probability",),
    kv_policies=("exact",),
    max_tokens=4,
    repeats=1,
)
MODEL = {"checkpoint": "some/model", "dtype": "fp32", "weight_dtype": None, "compile": False}
TIMES = ("seconds", "full_seconds", "catch_up_seconds")


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    model = make_model(replace(LLAMA, vocab_size=400), exits=(1, 3), use_exit_norm=True)
    tokenizer = make_tokenizer("sentencepiece", tmp_path_factory.mktemp("tokenizer"))
    engine = EarlyExitEngine(model.segmented, tokenizer, prefix_caching=False)
    return Evaluation(engine, ITEMS, SETTINGS, MODEL)


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole evaluation that was killed after three units, within the line of the third one."""
    folder = tmp_path_factory.mktemp("evaluation")

    def killed(units: Iterable[Unit]) -> Iterator[Unit]:
        for number, unit in enumerate(units):
            if number == 3:
                raise Killed
            yield unit

    with pytest.raises(Killed):
        evaluation.run(folder, killed)
    records = folder / RECORDS
    assert len(records.read_text().splitlines()) == 4
    records.write_bytes(records.read_bytes()[:-20])
    left: list[Unit] = []
    evaluation.run(folder, lambda units: left.extend(units) or left)
    # Of 2 prompts, the full model and two rules, two records were whole.
    assert len(left) == 4
    return folder


def test_a_killed_evaluation_has_the_records_of_one_in_one_go(evaluation, folder, tmp_path):
    evaluation.run(tmp_path, list)

    def records(where: Path) -> list[dict]:
        lines = map(json.loads, (where / RECORDS).read_text().splitlines())
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    assert records(folder) == records(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 5}, r"settings.max_tokens was 4 there and is 5 now"),
        ({"thresholds": (1.0, 0.2)}, r"settings.thresholds\[1\] was 0.3 there and is 0.2 now"),
        ({"kv_policies": ("propagate",)}, r'kv_policies\[0\] was "exact" there and is "propagate"'),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(evaluation, folder, change, message):
    before = (folder / RECORDS).read_bytes()
    other = replace(evaluation, settings=replace(SETTINGS, **change))
    with pytest.raises(ValueError, match=message):
        other.run(folder, list)
    assert (folder / RECORDS).read_bytes() == before


def test_other_prompts_or_another_model_are_refused(evaluation, folder):
    other = replace(evaluation, items=(ITEMS[0], Item("prose", "a list", "of words")))
    with pytest.raises(ValueError, match=r"items\[1\].reference"):
        other.run(folder, list)
    other = replace(evaluation, model={**MODEL, "checkpoint": "another"})
    with pytest.raises(ValueError, match='checkpoint was "some/model" there and is "another" now'):
        other.run(folder, list)


def test_a_damaged_line_is_named(evaluation, folder, tmp_path):
    lines = (folder / RECORDS).read_text().splitlines()
    lines[2] = lines[2][:30]
    (tmp_path / RECORDS).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 3: is damaged"):
        evaluation.run(tmp_path, list)


def test_results_have_everything(folder):
    results = json.loads((folder / RESULTS).read_text())
    assert {"model", "settings", "machine", "software", "items", "records"} < set(results)
    assert results["machine"]["cores"] >= 1
    assert results["software"]["packages"]["torch"]
    assert len(results["records"]) == 6
    with (folder / CURVE).open() as file:
        rows = list(csv.DictReader(file))
    tasks = ["all", "code", "prose"]
    assert [row["task"] for row in rows] == [task for task in tasks for _ in range(3)]
    assert [row["threshold"] for row in rows] == ["full", "1.0", "0.3"] * 3
    outcomes = results["outcomes"]
    for row, outcome in zip(rows, outcomes, strict=True):
        assert float(row["agreement"]) == outcome["point"]["agreement"]
        assert float(row["forced_agreement"]) == outcome["forced_agreement"]
        own = outcome["scores"]["rouge_l"]
        assert float(row["rouge_l"]) == own["value"]
        for name in ("p_value", "adjusted_p_value"):
            shown = "" if outcome["threshold"] is None else str(own[name])
            assert row[f"rouge_l_{name}"] == shown
    names = ("quality_against_speed", "exits", "calibration", "depth_over_position")
    for name in (*names, "speedup_by_task", "text_by_depth"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_written_again_from_the_records(folder, tmp_path):
    (tmp_path / RECORDS).write_bytes((folder / RECORDS).read_bytes())
    rebuild(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in (RESULTS, CURVE, REPORT):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_files_of_what_is_no_whole_evaluation_are_not_written(folder, tmp_path):
    with pytest.raises(ValueError, match=r"records.jsonl is no file, allowed: the folder of an"):
        rebuild(tmp_path)
    lines = (folder / RECORDS).read_text().splitlines()
    (tmp_path / RECORDS).write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(ValueError, match="has 4 of 6 records, allowed: all"):
        rebuild(tmp_path)
    (tmp_path / RECORDS).write_text(
        "\n".join([lines[0].replace('"repeats"', '"r"'), *lines[1:]]) + "\n"
    )
    with pytest.raises(ValueError, match=r"the settings are of another version: .*'r'"):
        rebuild(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]


def without(record: dict, *names: str) -> dict:
    """The same without an inner field."""
    name, *inner = names
    if inner:
        return {**record, name: without(record[name], *inner)}
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda header: without(header, "model", "weight_dtype")),
        (0, lambda header: {**header, "settings": [1]}),
        (0, lambda header: {**header, "items": 3}),
        (0, lambda header: without(header, "software", "packages")),
        (1, lambda record: without(record, "exits_held_out")),
        (2, lambda record: {**record, "scores": 3}),
        (2, lambda record: {**record, "seconds": []}),
        (2, lambda record: {**record, "logprobs": [*record["logprobs"][:-1], "x"]}),
    ],
)
def test_records_that_lack_something_are_refused(folder, tmp_path, place, change):
    lines = list(map(json.loads, (folder / RECORDS).read_text().splitlines()))
    lines[place] = change(lines[place])
    (tmp_path / RECORDS).write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    with pytest.raises(ValueError, match=r"records.jsonl is damaged, or of another version of"):
        rebuild(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]


class Page(HTMLParser):
    """Notes what a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = ("src", "href", "xlink:href", "action")
        self.addresses += [value or "" for name, value in attrs if name in named]


def test_the_report_is_one_page_that_asks_for_nothing(folder):
    text = (folder / REPORT).read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    # The texts of prompts are data: they neither end it nor are filled in.
    assert page.tags.count("script") == 2
    assert text.count("\\u003c/script>\\u003cscript>alert(1)") > 0
    assert all(one.startswith(("#", "data:")) for one in page.addresses)
    assert "@import" not in text
    assert "currentColor" in text
    assert "#010203" not in text
