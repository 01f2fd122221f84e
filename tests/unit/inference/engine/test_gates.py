"""Gates are asked before exits: the oracle's tokens, and no vocabulary where a gate refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from tests.helpers.reference_decoder import all_heads, choices, confidence_of, scores
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, TinyModel, make_model

PROMPTS = [[5, 17, 3, 44, 8], [1, 2, 3], [9], [40, 41, 42, 43, 44, 45]]
THRESHOLDS = (0.3, 0.5, 0.65)
COUNT = 12


def model_with_gates(kind: str = "norm", exits: tuple[int, ...] = (1, 2, 3), **others: Any) -> Any:
    return make_model(exits=exits, **{**HEADS[kind], "use_exit_gate": True}, **others)


def params(threshold: float, **others: Any) -> SamplingParams:
    return SamplingParams(
        mode="early_exit",
        early_exit_threshold=threshold,
        **{"exit_measure": "gate", "max_tokens": COUNT, **others},
    )


def check(model: TinyModel, prompt: list[int], result: Any, limits: Any, **rule: Any) -> None:
    """A result is what the oracle gives."""
    assert len(result.token_ids) == COUNT
    expected = choices(model, prompt, result.token_ids, limits, **{"measure": "gate", **rule})
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)
    assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head(architecture, kind):
    model = model_with_gates(kind, architecture=architecture)
    engine = EarlyExitEngine(model.segmented, max_pending=5)
    layers = set()
    for threshold in THRESHOLDS:
        found = engine.generate(PROMPTS, params(threshold))
        for prompt, result in zip(PROMPTS, found, strict=True):
            check(model, prompt, result, threshold)
            layers |= set(result.exit_layers)
    assert len(layers) > 2


def test_measures_are_mixed_in_a_batch():
    model = model_with_gates()
    engine = EarlyExitEngine(model.segmented, max_pending=4)
    measures = ("gate", "max_probability", "margin", "gate", "similarity")
    prompts = [PROMPTS[i % 4] for i in range(len(measures))]
    wanted = [params(0.5, exit_measure=measure) for measure in measures]
    found = engine.generate(prompts, wanted)
    for prompt, measure, result in zip(prompts, measures, found, strict=True):
        check(model, prompt, result, 0.5, measure=measure)


@pytest.mark.parametrize("max_pending", [1, 3, 64])
def test_details_tell_of_every_exit_on_the_way(max_pending):
    model = model_with_gates()
    engine = EarlyExitEngine(model.segmented, max_pending=max_pending)
    (plain,) = engine.generate([PROMPTS[0]], params(0.6))
    (found,) = engine.generate([PROMPTS[0]], params(0.6, exit_details=True))
    assert found.token_ids == plain.token_ids
    tokens = [*PROMPTS[0], *found.token_ids]
    heads = all_heads(model, tokens)
    for place, own in enumerate(found.heads):
        layers = [report.layer for report in own]
        assert layers == [1, 2, 3, 4][: len(layers)]
        assert found.exit_layers[place] in layers
        for report in own:
            head = heads[report.layer if report.layer < 4 else "final"]
            position = len(PROMPTS[0]) - 1 + place
            assert report.token_id == int(head.logits[position].argmax())
            expected = confidence_of(head, position, "gate")
            assert report.confidence == pytest.approx(expected, rel=2e-4)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each product with a vocabulary."""
    rows: list[int] = []
    project = Head.project

    def spy(head: Head, features: torch.Tensor) -> torch.Tensor:
        rows.append(len(features))
        return project(head, features)

    monkeypatch.setattr(Head, "project", spy)
    return rows


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.65, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "batch"])
def test_no_vocabulary_is_read_where_gates_refuse(projected, threshold, prompts):
    engine = EarlyExitEngine(model_with_gates().segmented, max_pending=64)
    found = engine.generate(prompts, params(threshold))
    # One row for each token, of the head that has given it.
    assert sum(projected) == sum(len(one.token_ids) for one in found)
    projected.clear()
    engine.generate(prompts, params(1.0, exit_measure="max_probability"))
    assert sum(projected) > sum(len(one.token_ids) for one in found)


@pytest.fixture
def run_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows have run through each segment."""
    rows = [0] * 4
    run = SegmentRunner.run

    def spy(runner: Any, segment: int, spans: Any, *inputs: Any, last: int) -> torch.Tensor:
        for index in range(segment, last + 1):
            rows[index] += sum(span.end - span.start for span in spans)
        return run(runner, segment, spans, *inputs, last=last)

    monkeypatch.setattr(SegmentRunner, "run", spy)
    return rows


@pytest.mark.parametrize("prompts", [[[5]], [[9], [40], [8], [5]]], ids=["alone", "batch"])
def test_held_tokens_run_no_deeper_than_their_gates_let_them(projected, run_rows, prompts):
    model = model_with_gates()
    engine = EarlyExitEngine(model.segmented)
    # At each exit some leave, and of those that get there many do, so that its gate is asked on
    # the way.
    wanted = SamplingParams(
        mode="early_exit",
        exit_measure="gate",
        exit_thresholds=(0.6, 0.6, 0.5),
        kv_policy="propagate",
        max_tokens=40,
    )
    found = engine.generate(prompts, wanted)
    depths = [layer for one in found for layer in one.exit_layers]
    assert set(depths) == {1, 2, 3, 4}
    expected = [sum(layer > segment for layer in depths) for segment in range(4)]
    assert run_rows == expected
    if len(prompts) == 1:
        # A token is one step, and its head one product.
        assert projected == [1] * len(depths)


def test_thresholds_of_exits_and_their_decay():
    model = model_with_gates()
    engine = EarlyExitEngine(model.segmented)
    limits = (0.7, 0.6, 0.4)
    wanted = SamplingParams(
        mode="early_exit",
        exit_measure="gate",
        exit_thresholds=limits,
        exit_threshold_decay=4.0,
        max_tokens=COUNT,
    )
    for prompt, result in zip(PROMPTS, engine.generate(PROMPTS, wanted), strict=True):
        check(model, prompt, result, limits, decay=4.0)


def test_sampling_draws_what_it_would_alone():
    """In a batch and alone the same random numbers meet the same probabilities."""
    model = model_with_gates()
    wanted = [params(0.5, temperature=1.0, seed=seed) for seed in range(4)]
    together = EarlyExitEngine(model.segmented).generate(PROMPTS, wanted)
    layers = set()
    for prompt, one, result in zip(PROMPTS, wanted, together, strict=True):
        (alone,) = EarlyExitEngine(model.segmented).generate([prompt], one)
        assert result.token_ids == alone.token_ids
        heads = all_heads(model, [*prompt, *result.token_ids])
        for place, layer in enumerate(result.exit_layers):
            position = len(prompt) - 1 + place
            sure = [x for x in (1, 2, 3) if confidence_of(heads[x], position, "gate") >= 0.5]
            assert layer == (sure[0] if sure else 4)
            layers.add(layer)
            logits = heads[layer if layer < 4 else "final"].logits[position]
            logprob = float(logits.log_softmax(-1)[result.token_ids[place]])
            assert result.logprobs[place] == pytest.approx(logprob, abs=2e-4)
    assert len(layers) > 1


@pytest.mark.parametrize("kind", ["norm", "block", "mlp", "final head"])
def test_prompts_are_scored_by_gates(kind):
    model = model_with_gates(kind)
    engine = EarlyExitEngine(model.segmented)
    tokens = [5, 17, 3, 44, 8, 1, 2, 3, 9, 40, 41, 42]
    for threshold in THRESHOLDS:
        wanted = params(threshold, max_tokens=0, prompt_logprobs=2, exit_threshold_decay=1.0)
        (result,) = engine.generate([tokens], wanted)
        expected = scores(model, tokens, threshold, measure="gate", decay=1.0)
        found = result.prompt_tokens[1:]
        assert [one.exit_layer for one in found] == [one.exit_layer for one in expected]
        for name in ("logprob", "confidence"):
            numbers = [getattr(one, name) for one in expected]
            assert [getattr(one, name) for one in found] == pytest.approx(numbers, abs=2e-4)


def test_a_text_whose_gates_refuse_reads_the_final_vocabulary_only(projected):
    engine = EarlyExitEngine(model_with_gates().segmented)
    engine.generate([PROMPTS[0]], params(1.0, max_tokens=0, prompt_logprobs=0))
    assert projected == [len(PROMPTS[0])]


def test_the_stored_measure_may_be_the_gate():
    model = model_with_gates()
    stored = TinyModel(
        model.architecture, replace(model.early_exit, exit_measure="gate"), model.weights
    )
    (found,) = EarlyExitEngine(stored.segmented).generate(
        [PROMPTS[0]], params(0.5, exit_measure=None)
    )
    check(model, PROMPTS[0], found, 0.5)


def test_models_without_gates_refuse():
    engine = EarlyExitEngine(make_model(exits=(1, 3), use_exit_norm=True).segmented)
    with pytest.raises(
        FieldError, match=r"exit_measure 'gate' needs exits with gates.*allowed: max"
    ):
        engine.generate([PROMPTS[0]], params(0.5))


def test_a_stream_that_is_not_finite_ends_its_request_alone():
    model = model_with_gates()
    embedding = model.weights["embedding.word_embeddings.weight"].clone()
    embedding[60] = torch.nan
    weights = {**model.weights, "embedding.word_embeddings.weight": embedding}
    broken = TinyModel(model.architecture, model.early_exit, weights)
    engine = EarlyExitEngine(broken.segmented)
    damaged, well = (engine.submit(prompt, params(1.0)) for prompt in ([60, 1], [1, 2]))
    while not well.is_finished:
        engine.step()
    assert damaged.result().error == NOT_FINITE
    check(model, [1, 2], well.result(), 1.0)
