"""Thresholds of single exits: what they are fitted to, and the rules that have them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron.early_exit.errors import FieldError
from megatron.early_exit.evaluation.choosing.calibration import Gain
from megatron.early_exit.evaluation.choosing.choice import stored_rule
from megatron.early_exit.evaluation.choosing.fitted_thresholds import (
    fitted_thresholds,
    least_threshold,
)
from megatron.early_exit.evaluation.choosing.paths import (
    fitted_paths_of,
    has_fitted_paths,
    num_paths,
    paths_of,
)
from megatron.early_exit.evaluation.choosing.texts import Texts
from megatron.early_exit.evaluation.choosing.wish import Wish, requirements_of
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.units import Unit, key_of

SETTINGS = Settings(
    tasks=("a",),
    thresholds=(0.5, 1.0, 0.8),
    measures=("max_probability", "margin"),
    kv_policies=("exact",),
    exit_layers=((1, 3), (1,), (3,)),
)


def by_search(confidences: np.ndarray, agrees: np.ndarray, share: float) -> float:
    """The least confidence of all above which enough agree, tried one by one."""
    for least in [0.0, *sorted(confidences)]:
        above = agrees[confidences >= least]
        if above.mean() >= share:
            return float(least)
    return 1.0


@pytest.mark.parametrize("seed", range(20))
def test_the_least_threshold_is_that_of_a_search(seed):
    draw = np.random.default_rng(seed)
    # Many are equal, and all are multiples of what thresholds are rounded to.
    confidences = draw.integers(1, 12, size=40) / 16
    agrees = draw.random(40) < confidences
    for share in (0.0, 0.4, 0.7, 0.9, 1.0):
        found = least_threshold(confidences, agrees, share)
        assert found == by_search(confidences, agrees, share)


def test_thresholds_are_rounded_up_to_four_digits():
    confidences, agrees = np.array([0.912345, 0.5]), np.array([True, False])
    assert least_threshold(confidences, agrees, 1.0) == 0.9124
    assert least_threshold(np.array([0.99999, 0.5]), agrees, 1.0) == 1.0


def test_an_exit_without_positions_lets_nothing_leave():
    assert least_threshold(np.array([]), np.array([], dtype=bool), 0.0) == 1.0


def answer(first, second, counted):
    """A record of two exits, (confidence, agrees) each."""

    def exit_of(pairs):
        return {"confidences": [one for one, _ in pairs], "agrees": [one for _, one in pairs]}

    exits = {"margin": {"1": exit_of(first), "3": exit_of(second)}}
    return {"exits": exits, "counted": counted}


def test_an_exit_is_fitted_to_what_no_exit_in_front_of_it_has_given():
    answers = [
        answer([(0.9, True), (0.5, False)], [(0.25, False), (0.75, True)], 2),
        # What is behind the end of the text does not count.
        answer([(0.5, False), (0.1, True)], [(0.5, False), (0.1, False)], 1),
    ]
    assert fitted_thresholds(answers, "margin", (1, 3), 1.0) == (0.9, 0.75)
    # By itself the deep exit is wrong at a token that leaves in front of it.
    assert fitted_thresholds(answers, "margin", (1, 3), 0.5) == (0.9, 0.0)
    assert fitted_thresholds(answers, "margin", (3,), 0.5) == (0.5,)


def test_paths_of_fitted_thresholds_are_those_of_several_exits():
    asked = []

    def fit(measure, exit_layers, share):
        asked.append((measure, exit_layers, share))
        return (max(share, 0.8), 0.25)

    paths = fitted_paths_of(SETTINGS, fit)
    assert [(one.measure, one.exit_layers) for one in paths] == [
        ("max_probability", (1, 3)),
        ("margin", (1, 3)),
    ]
    assert [one[2] for one in asked] == [1.0, 0.8, 0.5] * 2
    # What 0.5 comes to is the rule of 0.8.
    first, second = paths[0].rules
    assert first == Rule(1.0, "exact", "max_probability", (1, 3), (1.0, 0.25))
    assert second == Rule(0.8, "exact", "max_probability", (1, 3), (0.8, 0.25))
    assert paths[0].name == "max_probability, exact, exits 1+3, a threshold for each exit"
    assert num_paths(SETTINGS, is_fitting=True) == len(paths) + len(paths_of(SETTINGS)) == 8
    assert num_paths(SETTINGS, is_fitting=False) == 6
    assert has_fitted_paths(SETTINGS)
    assert not has_fitted_paths(replace(SETTINGS, exit_layers=((1,), (3,))))


def test_a_fitted_rule_asks_for_its_thresholds_and_has_records_of_its_own():
    rule = Rule(0.8, "exact", "margin", (1, 3), (0.9, 0.25))
    params = rule.params(max_tokens=2)
    assert (params.early_exit_threshold, params.exit_thresholds) == (None, (0.9, 0.25))
    keys = {
        key_of(Unit("untimed", 0, one).fields())
        for one in (rule, replace(rule, exit_thresholds=None), FULL)
    }
    assert len(keys) == 3
    # A record of before there were such rules is found by what it has.
    old = Unit("untimed", 0, FULL).fields()
    del old["exit_thresholds"]
    assert key_of(old) == key_of(Unit("untimed", 0, FULL).fields())


def test_a_fitted_rule_is_stored_with_its_thresholds():
    items = [Item("a", "a0", "r")]
    wish = Wish(agreement=0.9)
    model = {"dtype": "fp32", "weight_dtype": None, "quantize_heads": None}
    found = stored_rule(
        Rule(0.8, "exact", "margin", (1, 3), (0.9, 0.25)),
        Gain(2.0),
        wish=wish,
        requirements=requirements_of(wish, items),
        items=items,
        max_tokens=4,
        iteration="iter_0000001",
        model=model,
        commit=None,
    )
    assert (found.early_exit_threshold, found.exit_thresholds) == (None, (0.9, 0.25))
    assert found.exit_layers == (1, 3)


def test_what_thresholds_are_fitted_to_proves_nothing():
    items = [Item("a", f"a{i}", "r") for i in range(12)] + [Item("b", f"b{i}") for i in range(4)]
    texts = Texts.of(items, num_timed=3, num_fitting=4)
    prompts = [one.prompt for one in texts.fitting]
    assert prompts == ["a0", "a4", "a8", "b0"]
    assert not set(prompts) & {one.prompt for one in (*texts.proving, *texts.timed)}
    assert len(texts.proving) == 12
    everything = texts.everything
    assert [everything[i] for i in texts.timed_indices] == texts.timed
    assert [everything[i] for i in texts.fitting_indices] == texts.fitting
    # They are continued, whatever else the texts are for.
    assert {one.reference for one in (*texts.timed, *texts.fitting)} == {None}


def test_every_task_keeps_texts_that_prove():
    items = [Item("a", "a0"), Item("b", "b0"), Item("b", "b1")]
    with pytest.raises(FieldError, match="fitting_texts 1 leaves no text of task a that proves"):
        Texts.of(items, num_timed=1, num_fitting=1)
