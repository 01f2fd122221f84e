"""Prompts from files, and those that are made of the standard library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.early_exit.data.standard_library import manual, modules
from megatron.early_exit.evaluation.items import Item, read_tasks
from megatron.early_exit.evaluation.library_items import MAKERS


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize("name", MAKERS)
def test_items_of_the_library_are_the_same_on_every_run_and_stand_in_it(name):
    items = read_tasks([name], 5, 200, 3)
    assert items[:3] == read_tasks([name], 3, 200, 3)
    assert items[:3] != read_tasks([name], 3, 200, 4)
    assert len(items) == 5
    texts = list(manual() if name == "manual" else modules())
    for item in items:
        assert 0 < len(item.prompt) <= 200
        assert any(item.prompt + item.reference in text for text in texts)


def test_what_is_wanted_is_one_line():
    for item in read_tasks(["next_line", "docstring"], 6, 300, 0):
        assert item.reference.strip()
        assert "\n" not in item.reference
        if item.task == "docstring":
            assert item.prompt.endswith('"""')
            assert '"""' not in item.reference
        else:
            assert item.prompt.endswith("\n")
        assert item.cut(item.reference + "\nmore") == item.reference


def test_a_file_of_prompts_is_read(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        {"prompt": "a", "reference": "b", "stop": ["\n"]},
        {"prompt": "c", "choices": ["d", "e"], "gold": 1},
        {"prompt": "f"},
        {"text": "short"},
        {"text": "0123456789" * 4},
    )
    assert read_tasks([path], 8, 10, 0) == (
        Item("own", "a", "b", stop=("\n",)),
        Item("own", "c", choices=("d", "e"), gold=1),
        Item("own", "f"),
        Item("own", "0123456789", "0123456789"),
    )
    assert [item.prompt for item in read_tasks([path], 2, 10, 0)] == ["a", "f"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ([], "is no object"),
        ({}, "has no prompt"),
        ({"prompt": ""}, "has no prompt"),
        ({"prompt": "a", "answer": "b"}, "has the unknown field 'answer'"),
        ({"prompt": "a", "reference": 3}, "has a reference that is no string"),
        ({"prompt": "a", "choices": "ab", "gold": 0}, "has choices that are no list"),
        ({"prompt": "a", "choices": ["b", ""], "gold": 0}, "has choices that are no list"),
        ({"prompt": "a", "choices": ["b"], "gold": 0}, "fewer than 2 choices"),
        ({"prompt": "a", "choices": ["b", "c"], "gold": 2}, "a gold that is not the index"),
        ({"prompt": "a", "choices": ["b", "c"]}, "a gold that is not the index"),
        ({"prompt": "a", "choices": ["b", "c"], "gold": True}, "a gold that is not the index"),
        ({"prompt": "a", "choices": ["b", "c"], "gold": 0, "reference": "b"}, "no effect"),
        ({"prompt": "a", "gold": 0}, "has a gold without choices"),
        ({"text": "a", "prompt": "b"}, "has more than a text"),
        ({"text": None}, "has more than a text, or one that is no string"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line, problem):
    path = write(tmp_path / "own.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(ValueError, match=rf"own.jsonl, line 2: .*{problem}.*, allowed: "):
        read_tasks([path], 8, 10, 0)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="--tasks hellaswag: is no task, allowed: next_line"):
        read_tasks(["hellaswag"], 8, 10, 0)
    with pytest.raises(ValueError, match=r"none.jsonl cannot be read"):
        read_tasks([str(tmp_path / "none.jsonl")], 8, 10, 0)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 1: "):
        read_tasks([str(tmp_path / "broken.jsonl")], 8, 10, 0)
    short = write(tmp_path / "short.jsonl", {"text": "short"})
    with pytest.raises(ValueError, match="more than --prompt-characters 10"):
        read_tasks([short], 8, 10, 0)
    with pytest.raises(ValueError, match="several tasks are called manual"):
        read_tasks(["manual", "manual"], 1, 10, 0)
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "own.jsonl", {"prompt": "a"}))
    with pytest.raises(ValueError, match=r"called own, .* names differ without their folders"):
        read_tasks(paths, 1, 10, 0)
    every = write(tmp_path / "all.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match="all is what all tasks together are called"):
        read_tasks([every], 1, 10, 0)


def test_a_task_that_makes_no_prompts_is_refused():
    with pytest.raises(ValueError, match="manual has no prompts with --prompt-characters 10000000"):
        read_tasks(["manual"], 2, 10_000_000, 0)


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n'.encode())
    assert [item.prompt for item in read_tasks([str(path)], 8, 10, 0)] == ["a\u2028b\x85c", "d"]


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", {"prompt": "\U0001f600"}, {"prompt": "\ud800"})
    with pytest.raises(ValueError, match=r"own.jsonl, line 2: has half of a surrogate pair"):
        read_tasks([path], 8, 10, 0)
