"""Captured heads, with a recorder that a CPU can play."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.graphed_heads import GraphedHeads
from megatron.early_exit.inference.model.recorder import ROW_COUNTS
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.head_output import NOT_FINITE, head_figures
from tests.helpers.cpu_recorder import CpuRecorder
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, TinyModel, make_model

PROMPTS = [[5, 17, 3, 44, 8], [7], [9, 9, 2], list(range(1, 20)), [4, 4]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def recorded(model: TinyModel) -> tuple[SegmentedModel, CpuRecorder]:
    """A model with plain layers whose heads are to be captured."""
    segmented = SegmentedModel(model.architecture, model.early_exit, model.weights)
    segmented.recorder = recorder = CpuRecorder()
    return segmented, recorder


def rows(count: int, model: SegmentedModel) -> torch.Tensor:
    size = (count, model.architecture.hidden_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(count))


def check(found: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    logits, figures = found
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(figures, head_figures(expected))


def test_what_cannot_be_captured_is_told(monkeypatch):
    model, recorder = recorded(make_model(exits=(1,)))

    def fail(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recorder, "record", fail)
    message = "^compile is not possible here: operation not permitted when stream is capturing$"
    with pytest.raises(ValueError, match=message):
        GraphedHeads(model)


@pytest.mark.parametrize("heads", ["projection", "untied", "norm", "few answers", "mlp"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_head(architecture, heads):
    """In one launch, for all numbers of rows; those that are missing change nothing."""
    model, recorder = recorded(
        make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])
    )
    graphed = GraphedHeads(model)
    captured = recorder.count
    own = [exit_.head for exit_ in model.exits] + [model.final_head]
    for replays, (count, head) in enumerate(
        ((count, head) for count in (64, 1, 2, 3, 8, 33) for head in own), start=1
    ):
        assert graphed.serves(count)
        hidden = rows(count, model)
        check(graphed.evaluate(head, [hidden]), head.logits(hidden))
        assert recorder.replays == replays
    assert not graphed.serves(65)
    assert recorder.count == captured


@pytest.mark.parametrize("heads", ["projection", "norm", "few answers", "mlp", "block"])
def test_heads_that_share_a_projection_take_one_product(heads):
    model, recorder = recorded(make_model(exits=(1, 3), **HEADS[heads]))
    graphed = GraphedHeads(model)
    own = [exit_.head for exit_ in model.exits]
    features = [rows(3, model), rows(4, model)]
    found = graphed.project(own[0], features)
    check(found, own[1].project(torch.cat(features)))
    assert recorder.replays == 1


def test_no_more_is_captured_than_can_be_asked():
    """A head as a whole, where it has a branch; and a projection, where several heads share it."""
    for heads, expected in (
        ("projection", 2),  # All exits and the embedding; and the final head with its norm.
        ("untied", 3),
        ("norm", 4),
        ("block", 2),
        ("all", 3),
    ):
        model, recorder = recorded(make_model(exits=(1, 3), **HEADS[heads]))
        GraphedHeads(model)
        assert recorder.count == expected * len(ROW_COUNTS), heads


def test_what_has_been_given_out_is_not_written_over():
    model, _ = recorded(make_model(exits=(1,), **HEADS["untied"]))
    graphed, hidden = GraphedHeads(model), rows(5, model)
    own = [model.exits[0].head, model.final_head]
    found = [graphed.evaluate(head, [hidden[:count]]) for count in (3, 4) for head in own]
    expected = [head.logits(hidden[:count]) for count in (3, 4) for head in own]
    for one, other in zip(found, expected, strict=True):
        check(one, other)


def test_logits_that_are_not_finite_are_those_of_their_rows_alone():
    model, _ = recorded(make_model(ARCHITECTURES["gpt2"], exits=(1,), **HEADS["norm"]))
    graphed, hidden = GraphedHeads(model), rows(3, model)
    damaged = hidden.clone()
    damaged[1] = torch.nan
    logits, figures = graphed.evaluate(model.final_head, [damaged])
    assert figures[0].isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(logits[::2], model.final_head.logits(hidden)[::2])
    # What is left of them stands where rows are missing now.
    check(graphed.evaluate(model.final_head, [hidden[:1]]), model.final_head.logits(hidden[:1]))
    found = graphed.project(model.final_head, [hidden[:2], hidden[2:]])
    check(found, model.final_head.project(hidden))


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("llama", "all"),
        ("gpt2", "block"),
        ("nemotron", "mlp"),
        ("llama", "few answers"),
        ("llama", "final head"),
    ],
)
def test_an_engine_answers_as_with_plain_heads(architecture, heads):
    model = make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])
    segmented, recorder = recorded(model)
    engine = EarlyExitEngine(segmented, max_batch_size=4)
    captured = recorder.count
    params = [
        SamplingParams(max_tokens=8, logprobs=2),
        SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.4, logprobs=1),
        SamplingParams(max_tokens=8, mode="self_speculative"),
        SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.4, seed=3),
        SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=4),
    ]
    found = engine.generate(PROMPTS, params)
    assert recorder.replays > 8
    assert recorder.count == captured
    plain = EarlyExitEngine(model.segmented, max_batch_size=4).generate(PROMPTS, params)
    for one, other in zip(found, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.exit_layers == other.exit_layers
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_sequence_that_is_not_finite_fails_alone():
    model = make_model(exits=(1,), **HEADS["untied"])
    model.weights["embedding.word_embeddings.weight"][9] = torch.nan
    segmented, _ = recorded(model)
    engine = EarlyExitEngine(segmented, max_batch_size=4)
    params = SamplingParams(max_tokens=4, mode="early_exit", early_exit_threshold=0.4)
    damaged, sound = engine.generate([[9, 5], [5, 7]], params)
    assert damaged.error == NOT_FINITE
    (alone,) = EarlyExitEngine(model.segmented).generate([[5, 7]], params)
    assert (sound.error, sound.token_ids) == (None, alone.token_ids)
