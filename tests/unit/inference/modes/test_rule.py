"""Where a token leaves: decided by one rule, by whatever it measures."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.modes import early_exit
from megatron.early_exit.inference.modes.head_output import head_outputs
from megatron.early_exit.inference.modes.rule import MEASURES, NO_EXITS, DraftRule, ExitRule
from tests.helpers.margin import margin, margin_tokens
from tests.helpers.tiny_models import make_model

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.0]])


def test_the_threshold_itself_is_enough():
    rule = ExitRule((0, 2), threshold=0.5)
    assert rule.takes(0.5)
    assert not rule.takes(math.nextafter(0.5, 0))
    assert not NO_EXITS.takes(1.0)
    assert not rule.takes(math.nan)


def test_a_rule_without_a_threshold_takes_everything_where_it_has_exits():
    assert ExitRule((1,), threshold=0.0).takes_everything
    assert not ExitRule((), threshold=0.0).takes_everything
    assert not ExitRule((1,), threshold=0.1).takes_everything


def test_exits_that_have_been_asked_are_not_asked_again():
    rule = ExitRule((0, 2, 3), 0.5)
    assert rule.behind(0) == ExitRule((2, 3), 0.5)
    assert rule.behind(3).exits == ()


@pytest.mark.parametrize("rule", [NO_EXITS, ExitRule((0, 4), 0.25, "margin")])
def test_a_rule_survives_the_way_to_another_process(rule):
    assert ExitRule.from_message(json.loads(json.dumps(rule.message()))) == rule


def test_confidence_is_the_largest_probability_by_default():
    for output, logits in zip(head_outputs(LOGITS), LOGITS, strict=True):
        assert NO_EXITS.measured(output) is output
        assert output.confidence == pytest.approx(float(logits.softmax(-1).max()))
        assert MEASURES[NO_EXITS.measure](output) == output.confidence


def test_drafts_end_where_they_are_unlikely_or_too_many():
    by_confidence, by_acceptance = DraftRule(4, 0.2), DraftRule(4, 0.0)
    assert by_confidence.takes(0.2)
    assert not by_confidence.takes(0.19)
    assert [by_confidence.next_aim(n) for n in (1, 9)] == [4, 4]
    assert [by_acceptance.next_aim(n) for n in (1, 9)] == [1, 4]


def test_what_a_new_measure_takes():
    lines = len(inspect.getsource(margin).splitlines()) + 1
    print(f"a new measure of confidence: 1 file, {lines} lines")
    assert lines <= 40


def test_a_new_measure_is_one_entry_of_the_table(monkeypatch):
    """The worked example of docs: the margin between the two most probable tokens."""
    monkeypatch.setitem(MEASURES, "margin", margin)
    monkeypatch.setattr(early_exit, "ExitRule", partial(ExitRule, measure="margin"))
    model = make_model(exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    layers = set()
    for threshold in (0.0, 0.1, 0.2, 0.4, 1.0):
        params = SamplingParams(
            mode="early_exit", early_exit_threshold=threshold, max_tokens=8, prompt_logprobs=0
        )
        prompts = [[1, 2, 3], [9], [40, 41, 42, 43, 44]]
        for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
            expected = margin_tokens(model, [*prompt, *result.token_ids], threshold)
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
