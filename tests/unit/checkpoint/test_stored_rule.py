"""Rules that are stored with a model: they are kept where they stay true, and nothing is lost."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint import text_files
from megatron.early_exit.checkpoint.description import read_description
from megatron.early_exit.checkpoint.inspection import inspect
from megatron.early_exit.checkpoint.location import DESCRIPTION_NAME, locate
from megatron.early_exit.checkpoint.stored_rule import (
    StoredRule,
    described_without_rule,
    store_rule,
)
from tests.helpers.stored_rules import make_rule
from tests.helpers.text_checkpoint import save_text_checkpoint
from tools.checkpoint import main as convert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a stored rule."""
    path = save_text_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    store_rule(path, make_rule(locate(path).iteration_dir.name), described_without_rule(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something that is described."""
    values = {"format": 1, "added by a later version": [1]}
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(values))
    return tmp_path


def content(folder: Path) -> dict:
    return json.loads((folder / DESCRIPTION_NAME).read_text())


def test_a_rule_is_read_as_it_was_stored(checkpoint):
    assert read_description(checkpoint).rule == make_rule(locate(checkpoint).iteration_dir.name)


def test_storing_and_taking_out_leave_all_else_as_it_is(folder):
    before = content(folder)
    store_rule(folder, make_rule(), described_without_rule(folder))
    stored = content(folder)
    assert StoredRule.from_dict(stored.pop("rule")) == make_rule()
    assert stored == before
    store_rule(folder, make_rule(kv_policy="exact"), described_without_rule(folder))
    assert content(folder)["rule"]["kv_policy"] == "exact"
    store_rule(folder, None, described_without_rule(folder))
    assert content(folder) == before
    assert [one.name for one in folder.iterdir()] == [DESCRIPTION_NAME]


def test_thresholds_of_single_exits_are_kept(folder):
    each = {"early_exit_threshold": None, "exit_thresholds": (0.5, 0.25), "exit_layers": (1, 3)}
    rule = make_rule(**each)
    store_rule(folder, rule, described_without_rule(folder))
    assert StoredRule.from_dict(content(folder)["rule"]) == rule
    assert "thresholds 0.5, 0.25 of margin at exits 1, 3" in rule.sentence()
    assert "early_exit_threshold" not in rule.defaults()


def test_a_rule_of_before_there_were_thresholds_of_single_exits_is_read():
    values = json.loads(json.dumps(make_rule().to_dict()))
    del values["exit_thresholds"]
    assert StoredRule.from_dict(values) == make_rule()


def test_a_model_that_has_changed_meanwhile_gets_no_rule(folder):
    before = described_without_rule(folder)
    changed = {**content(folder), "early_exit": {}}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="has changed since the model was loaded"):
        store_rule(folder, make_rule(), before)
    assert content(folder) == changed


def test_a_write_that_fails_leaves_the_old_description(folder, monkeypatch):
    before = content(folder)

    def full(number: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(text_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store_rule(folder, make_rule(), described_without_rule(folder))
    assert content(folder) == before
    assert [one.name for one in folder.iterdir()] == [DESCRIPTION_NAME]


def test_a_model_without_a_description_cannot_store_one(tmp_path):
    with pytest.raises(ValueError, match=f"has no {DESCRIPTION_NAME}"):
        described_without_rule(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_exit_threshold": 1.5}, "early_exit_threshold 1.5 is out of range"),
        ({"exit_measure": "luck"}, "exit_measure 'luck', allowed: max_probability, margin"),
        ({"kv_policy": "lazy"}, "kv_policy 'lazy', allowed: exact, propagate"),
        ({"promise": None}, "rule does not fit this version"),
        ({"early_exit_threshold": None}, "allowed: one of the two"),
        ({"exit_thresholds": [0.5]}, "allowed: one of the two"),
        (
            {"early_exit_threshold": None, "exit_thresholds": [0.5, 0.25]},
            "exit_thresholds 0.5 0.25, allowed: one for each of exit_layers 1",
        ),
        (
            {"early_exit_threshold": None, "exit_thresholds": [1.5]},
            "exit_thresholds 1.5 is out of range",
        ),
        ({"exit_layers": [2]}, "exit_layers 2, allowed: the model's exits, 1 3"),
        ({"exit_layers": []}, "exit_layers none, allowed: the model's exits, 1 3"),
        ({"exit_measure": "gate"}, "exit_measure gate, allowed: with exits that have gates"),
    ],
)
def test_a_damaged_rule_is_ignored_and_its_field_named(
    change, message, checkpoint, monkeypatch, caplog
):
    values = content(checkpoint)
    values["rule"].update(change)
    monkeypatch.setattr("megatron.early_exit.checkpoint.description.read_json", lambda path: values)
    with caplog.at_level(logging.WARNING):
        assert read_description(checkpoint).rule is None
    (said,) = caplog.messages
    assert message in said
    assert f"{checkpoint / DESCRIPTION_NAME}: the stored rule is ignored: " in said


def test_inspect_shows_the_rule_and_its_promise(checkpoint, capsys):
    assert convert(["inspect", str(checkpoint)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "threshold 0.25 of margin at exits 1, kv_policy propagate" in shown
    assert "99 % agreement with the full model and at most 0.5 points of f1 lost" in shown
    assert (
        "answered greedily, with a confidence of 0.95 (512 texts, 2026-01-31, found in fp32)"
        in shown
    )
    assert convert(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert StoredRule.from_dict(found["rule"]) == read_description(checkpoint).rule
    other = replace(inspect(checkpoint), path="elsewhere/iter_0000001")
    assert "(of iter_0000007 only)" in " ".join(" ".join(other.lines()).split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("quantize {} {}", "weights in 8 bits are another model"),
        ("strip-exits {} {}", "the model has no exits now"),
        ("add-exits {} {} --exit-layer-nums 2 --use-exit-norm", "the model has other exits now"),
        ("export-hf {} {}", "no program reads it there"),
    ],
)
def test_a_conversion_that_changes_the_model_leaves_the_rule_out_and_says_so(
    words, reason, checkpoint, tmp_path, capsys
):
    target = tmp_path / "made"
    assert convert(words.format(checkpoint, target).split()) == 0
    assert f"is left out: {reason}" in capsys.readouterr().out
    if "export" not in words:
        assert read_description(target).rule is None


def test_a_conversion_that_changes_nothing_it_was_found_of_carries_the_rule(
    checkpoint, tmp_path, capsys
):
    assert convert(["add-mtp", str(checkpoint), str(tmp_path / "a"), "--mtp-num-layers", "1"]) == 0
    assert convert(["strip-mtp", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    for name in "ab":
        assert read_description(tmp_path / name).rule == make_rule("release")
    assert "left out" not in capsys.readouterr().out


def test_a_rule_of_another_iteration_is_not_carried(checkpoint, tmp_path, capsys, monkeypatch):
    values = content(checkpoint)
    values["rule"]["iteration"] = "iter_0000001"
    monkeypatch.setattr("megatron.early_exit.checkpoint.description.read_json", lambda path: values)
    assert convert(["add-mtp", str(checkpoint), str(tmp_path / "a"), "--mtp-num-layers", "1"]) == 0
    assert "is left out: it was found of other weights" in capsys.readouterr().out
    monkeypatch.undo()
    assert read_description(tmp_path / "a").rule is None
