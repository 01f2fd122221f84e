"""Where a token leaves: decided by one rule, by whatever it measures."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.modes.head_output import head_outputs
from megatron.early_exit.inference.modes.measures import MEASURES
from megatron.early_exit.inference.modes.mode import ModeContext
from megatron.early_exit.inference.modes.rule import NO_EXITS, DraftRule, ExitRule
from tests.helpers.measure_example import duel, duel_tokens
from tests.helpers.tiny_models import make_model

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.0]])


def test_the_threshold_itself_is_enough():
    rule = ExitRule((0, 2), (0.5, 0.25))
    assert rule.takes(0, 0.5)
    assert not rule.takes(0, math.nextafter(0.5, 0))
    assert rule.takes(2, 0.25)
    assert not rule.takes(2, math.nextafter(0.25, 0))
    assert not rule.takes(0, math.nan)


def test_what_has_no_threshold_takes_nothing():
    assert not NO_EXITS.takes(0, 1.0)
    assert not ExitRule((0, 2)).takes(2, 1.0)
    assert not ExitRule((0, 2), (0.0, 0.0)).takes(1, 1.0)


@pytest.mark.parametrize(
    ("given", "decay", "place", "length", "expected"),
    [
        (0.8, 4.0, 0, 10, 0.82),
        (0.8, 4.0, 5, 10, 0.72 + 0.1 * math.exp(-2)),
        (0.0, 1.0, 3, 3, 0.1 * math.exp(-1)),
        (1.0, 2.0, 0, 1, 1.0),
        (0.8, 0.0, 7, 10, 0.8),
        (0.5, 100.0, 1000, 1, 0.45),
    ],
)
def test_thresholds_decay_with_the_place_of_the_token(given, decay, place, length, expected):
    rule = ExitRule((1,), (given,), decay=decay, length=length).at(place)
    assert rule.threshold(1) == pytest.approx(expected, abs=1e-12)
    assert rule.takes(1, expected + 1e-9)
    assert expected == 1 or rule.takes(1, expected - 1e-9) is False


def test_a_text_of_another_length_begins_anew():
    rule = ExitRule((1,), (0.5,), decay=2.0, length=4).at(3)
    assert rule.over(8).at(4).threshold(1) == pytest.approx(0.45 + 0.1 * math.exp(-1))
    assert rule.over(8) == rule.over(8).at(0)


def test_a_rule_without_a_threshold_takes_everything_where_it_has_exits():
    assert ExitRule((1,), (0.0,)).takes_everything
    assert ExitRule((1, 2), (0.0, 0.5)).takes_everything
    assert not ExitRule().takes_everything
    assert not ExitRule((1,)).takes_everything
    assert not ExitRule((1, 2), (0.1, 0.0)).takes_everything
    assert not ExitRule((1,), (0.0,), decay=1.0).takes_everything


def test_exits_that_have_been_asked_are_not_asked_again():
    rule = ExitRule((0, 2, 3), (0.5, 0.25, 0.75), "margin", 4.0, 10, 3)
    assert rule.behind(0) == ExitRule((2, 3), (0.25, 0.75), "margin", 4.0, 10, 3)
    assert rule.behind(3) == ExitRule((), (), "margin", 4.0, 10, 3)
    assert ExitRule((0, 2)).behind(0) == ExitRule((2,))


@pytest.mark.parametrize("rule", [NO_EXITS, ExitRule((0, 4), (0.25, 0.5), "margin", 4.0, 100, 7)])
def test_a_rule_survives_the_way_to_another_process(rule):
    assert ExitRule.from_message(json.loads(json.dumps(rule.message()))) == rule


def test_confidence_is_the_largest_probability_by_default():
    for output, logits in zip(head_outputs(LOGITS), LOGITS, strict=True):
        assert output.confidence == pytest.approx(float(logits.softmax(-1).max()))
    assert NO_EXITS.measure == "max_probability"


def test_drafts_end_where_they_are_unlikely_or_too_many():
    by_confidence, by_acceptance = DraftRule(4, 0.2), DraftRule(4, 0.0)
    assert by_confidence.takes(0.2)
    assert not by_confidence.takes(0.19)
    assert [by_confidence.next_aim(n) for n in (1, 9)] == [4, 4]
    assert [by_acceptance.next_aim(n) for n in (1, 9)] == [1, 4]


def test_what_a_new_measure_takes():
    # The table's line, and the name among `ExitMeasure`'s.
    lines = len(inspect.getsource(duel).splitlines()) + 2
    print(f"a new measure of confidence: 2 files, {lines} lines")
    assert lines <= 40


def test_a_new_measure_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(MEASURES, "duel", duel)
    monkeypatch.setattr(ModeContext, "measure", "duel")
    model = make_model(exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    layers = set()
    for threshold in (0.0, 0.55, 0.6, 0.8, 1.0):
        params = SamplingParams(
            mode="early_exit", early_exit_threshold=threshold, max_tokens=8, prompt_logprobs=0
        )
        prompts = [[1, 2, 3], [9], [40, 41, 42, 43, 44]]
        for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
            expected = duel_tokens(model, [*prompt, *result.token_ids], threshold)
            found = list(zip(result.token_ids, result.exit_layers, strict=True))
            behind = expected[len(prompt) - 1 : -1]
            assert found == [(token, layer) for token, layer, _ in behind]
            assert result.confidences == pytest.approx([c for _, _, c in behind], abs=1e-4)
            # Texts are scored by the same rule.
            scored = [(one.exit_layer, one.confidence) for one in result.prompt_tokens[1:]]
            for (layer, confidence), (_, known, sure) in zip(scored, expected, strict=False):
                assert layer == known
                assert confidence == pytest.approx(sure, abs=1e-4)
            layers |= set(result.exit_layers)
    assert len(layers) == 3
