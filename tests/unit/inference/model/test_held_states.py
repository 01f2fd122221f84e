"""Held positions get the keys and values that the attentions themselves make of their states."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.tiny_models import ARCHITECTURES, GPT2, HEADS, LLAMA, make_model

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}
SPANS = {"one": [Span(1, 2, 6)], "several": [Span(0, 3, 4), Span(2, 0, 2), Span(1, 4, 8)]}


def two_runners(model) -> list[SegmentRunner]:
    """With the same positions behind the first exit, in all slots."""
    runners = [SegmentRunner(model.segmented, 3, len(TOKENS)) for _ in range(2)]
    for runner in runners:
        for slot in range(3):
            runner.run(0, [Span(slot, 0, len(TOKENS))], TOKENS[slot:] + TOKENS[:slot])
    return runners


def assert_same_memory(model, spans, tolerance) -> None:
    propagating, plain = two_runners(model)
    for index in range(1, len(model.segmented.segments)):
        propagating.propagate(index, spans)
        for span in spans:
            held = torch.ones(span.length, dtype=torch.bool)
            before = plain.slot_memory(span).kept[index - 1].clone()
            behind = plain.run(index, [span], held=held)
            assert torch.equal(behind, before)
        for slot in range(3):
            everything = Span(slot, 0, len(TOKENS))
            one, other = (runner.slot_memory(everything) for runner in (propagating, plain))
            for found, expected in zip(one.segments, other.segments, strict=True):
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
            for found, expected in zip(one.kept, other.kept, strict=True):
                assert torch.equal(found, expected)
    found = [part for part in propagating.slot_memory(spans[0]).segments if len(part)]
    assert all(part.abs().sum() > 0 for part in found)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@torch.inference_mode()
def test_every_architecture_and_format(architecture, dtype):
    model = make_model(architecture, exits=(1, 3), dtype=dtype)
    for spans in SPANS.values():
        assert_same_memory(model, spans, TOLERANCES[dtype])


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
@torch.inference_mode()
def test_where_an_exit_divides_a_layer(architecture):
    model = make_model(architecture, exits=(1, 3), **HEADS["mlp"])
    assert_same_memory(model, SPANS["several"], TOLERANCES[torch.float32])


@torch.inference_mode()
def test_a_segment_without_an_attention_only_keeps_states():
    model = make_model(exits=(1, 4), **HEADS["mlp"])
    assert not model.segmented.segments[2].attentions
    assert model.segmented.held_states(2) is None
    assert_same_memory(model, SPANS["one"], TOLERANCES[torch.float32])


def test_nothing_is_copied_before_a_position_is_held():
    model = make_model(exits=(1, 3)).segmented
    assert model._held_states == {}
    assert model.held_states(1) is model.held_states(1)
    assert set(model._held_states) == {1}
