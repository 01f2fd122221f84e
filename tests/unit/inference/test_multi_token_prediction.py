"""Drafts of a multi-token-prediction module are what its definition says, and change no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.engine import mtp_drafting
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.mtp_models import assert_drafts, mtp_model
from tests.helpers.quantized_models import quantized_model, rounded_model
from tests.helpers.reference_decoder import choices, generate
from tests.helpers.tiny_models import ARCHITECTURES, LLAMA, TinyModel

PROMPT = [5, 17, 3, 44, 8]
TEXT = [(7 * place * place + place) % 61 for place in range(50)]
TIED = replace(LLAMA, share_embeddings_and_output_weights=True)
MODELS = {
    "one depth": {"depths": 1},
    "two depths": {"depths": 2},
    "a repeated layer": {"depths": 3, "repeated": True},
    "tied": {"depths": 3, "architecture": TIED, "noise": 1.0},
    "nemotron": {"depths": 2, "architecture": ARCHITECTURES["nemotron"]},
    "no positions": {"depths": 2, "architecture": ARCHITECTURES["odd ones"]},
}


def drafting(**options: Any) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": 20, "draft_confidence": 1e-9, **options}
    return SamplingParams(mode="self_speculative", draft_method="mtp", **fields)


def run(
    engine: EarlyExitEngine,
    model: TinyModel,
    prompts: Sequence[list[int]],
    params: SamplingParams | None = None,
    num_answers: int | None = None,
) -> list[GenerationResult]:
    """Continue prompts, and compare all drafts with the definition's, and the texts with the full
    model's."""
    params = params or drafting()
    requests = [engine.submit(prompt, params) for prompt in prompts]
    seen: set[tuple[int, ...]] = set()
    while not all(request.is_finished for request in requests):
        engine.step()
        for request in requests:
            sequence = request.sequence
            text = (*sequence.prompt, *sequence.generated)
            if sequence.drafts and not request.is_finished and text not in seen:
                seen.add(text)
                assert_drafts(model, text, sequence.drafts, num_answers)
    results = [request.result() for request in requests]
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == params.max_tokens
        expected = choices(model, prompt, result.token_ids, None)
        assert result.token_ids == [token.token_id for token in expected]
    return results


@pytest.mark.parametrize("name", MODELS)
def test_drafts_are_those_of_the_definition(name):
    model = mtp_model(**MODELS[name])
    (result,) = run(EarlyExitEngine(model.segmented), model, [PROMPT])
    counts = result.statistics.drafts
    assert counts is not None
    assert (counts.mtp_drafted, counts.mtp_accepted) == (counts.drafted, counts.accepted)
    # Some are right, and some are not, where the text is not one token over and over again.
    assert counts.accepted > 0
    assert counts.accepted < counts.drafted or name == "tied"
    assert counts.verifications + counts.accepted == 20
    # No layer has run for those that are right.
    assert result.exit_layers.count(0) == counts.accepted
    assert set(result.exit_layers) == {0, model.architecture.num_layers}


def test_a_random_module_changes_no_text_either():
    model = mtp_model(3, noise=None)
    (result,) = run(EarlyExitEngine(model.segmented), model, [PROMPT])
    assert result.statistics.drafts is not None
    assert result.statistics.drafts.drafted > 20


@pytest.mark.parametrize("max_rows", [3, 7])
def test_prompts_in_pieces(max_rows):
    model = mtp_model(3, noise=0.3)
    engine = EarlyExitEngine(model.segmented)
    engine.loop.scheduler.max_rows = max_rows
    run(engine, model, [TEXT[:20], TEXT[3:8], TEXT[5:6], TEXT[30:45]], drafting(max_tokens=8))


def test_what_a_pause_has_left_out_is_caught_up(monkeypatch):
    monkeypatch.setattr(mtp_drafting, "_MOST_ROWS", 4)
    model = mtp_model(2, noise=0.3)
    engine = EarlyExitEngine(model.segmented)
    prompts = [TEXT[:11], TEXT[4:7]]
    requests = [engine.submit(prompt, drafting(max_tokens=24)) for prompt in prompts]
    for step in range(40):
        for request in requests:
            request.mode._pause = 1 if 2 < step < 12 else 0
        engine.step()
        for request in requests:
            sequence = request.sequence
            if step > 11 and sequence.drafts and not request.is_finished:
                text = (*sequence.prompt, *sequence.generated)
                assert_drafts(model, text, sequence.drafts)
                room = 24 - len(sequence.generated) - 1
                assert step < 14 or len(sequence.drafts) == min(room, 2)
    assert all(request.result().statistics.drafts.undrafted >= 8 for request in requests)


@pytest.mark.parametrize("depths", [1, 3])
def test_shared_prefixes_bring_their_rows(depths):
    """Also where a page is followed by other tokens than when it was stored: the last rows of its
    positions depend on those."""
    model = mtp_model(depths, noise=0.3)
    engine = EarlyExitEngine(model.segmented)
    params = drafting(max_tokens=6)
    first = TEXT[:36]
    other = [*first[:PAGE_SIZE], *[(one + 9) % 61 for one in first[PAGE_SIZE:]]]
    known = []
    for prompt in (first, other, [*other[:34], 3], first, first[: PAGE_SIZE + 2]):
        (result,) = run(engine, model, [prompt], params)
        known.append(result.statistics.num_cached_tokens)
    assert known == [0, PAGE_SIZE, 2 * PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE]
    # What others have stored lacks the rows, which are computed when they are needed.
    engine = EarlyExitEngine(model.segmented)
    engine.generate([first], SamplingParams(max_tokens=2))
    (result,) = run(engine, model, [first], params)
    assert result.statistics.num_cached_tokens == 2 * PAGE_SIZE


def test_sequences_that_are_preempted_go_on():
    model = mtp_model(2, noise=0.3, exits=(1, 3), use_exit_block=True)
    size = sum(page_bytes(model.segmented)) * (32 // PAGE_SIZE)
    engine = EarlyExitEngine(model.segmented, max_sequence_length=32, kv_cache_memory=size)
    run(engine, model, [TEXT[:6], TEXT[10:17], TEXT[20:25]], drafting(max_tokens=14))
    assert engine.pages.counts.preemptions > 0


def test_one_that_is_cancelled_leaves_nothing():
    model = mtp_model(2)
    engine = EarlyExitEngine(model.segmented, max_batch_size=1)
    gone = engine.submit(TEXT[:18], drafting())
    while len(gone.sequence.generated) < 4:
        engine.step()
    engine.cancel(gone)
    run(engine, model, [PROMPT])


def test_all_modes_in_one_batch():
    model = mtp_model(2, noise=0.2, exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    params = [
        drafting(),
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, mode="self_speculative", draft_method="exit"),
        SamplingParams(max_tokens=20, mode="self_speculative"),
        SamplingParams(max_tokens=20, mode="early_exit", early_exit_threshold=1.0),
        drafting(exit_details=True),
    ]
    results = engine.generate([PROMPT] * len(params), params)
    expected = [token.token_id for token in generate(model, PROMPT, 20, None)]
    assert [result.token_ids for result in results] == [expected] * len(params)
    by_exit = results[2].statistics.drafts
    assert by_exit is not None
    assert by_exit.drafted > by_exit.mtp_drafted == 0
    # The module is asked about as many tokens as it can draft, not about the one behind them.
    told = [[head.layer for head in heads] for heads in results[-1].heads]
    assert {tuple(one) for one in told} == {(0, 4), (4,)}


def test_drafts_of_a_part_of_the_vocabulary():
    model = mtp_model(2, noise=0.2)
    segmented = SegmentedModel(
        model.architecture, model.early_exit, model.weights, draft_vocab_size=30
    )
    (result,) = run(EarlyExitEngine(segmented), model, [PROMPT], num_answers=30)
    assert result.statistics.drafts is not None
    assert result.statistics.drafts.accepted > 0
    whole = model.architecture.vocab_size
    assert (segmented.draft_vocab_size, model.segmented.draft_vocab_size) == (30, whole)
    beside = mtp_model(2, exits=(1,), exit_vocab_size=20).segmented
    states = torch.zeros(1, model.architecture.hidden_size)
    assert beside.draft_vocab_size == beside.mtp_head.logits(states).isfinite().sum() == 20
    # Where none of them may come, nothing is drafted.
    params = drafting(temperature=1.0, seed=1, stop_token_ids=range(30), min_tokens=20)
    (result,) = EarlyExitEngine(segmented).generate([PROMPT], params)
    assert result.statistics.drafts is not None
    assert result.finish_reason == "length"
    assert result.statistics.drafts.drafted == 0


@pytest.mark.parametrize("architecture", [LLAMA, TIED], ids=["untied", "tied"])
def test_weights_in_8_bits(architecture):
    model = mtp_model(2, noise=0.3, architecture=architecture)
    run(EarlyExitEngine(quantized_model(model)), rounded_model(model), [PROMPT, TEXT[:9]])


def test_a_seed_gives_the_same_text_in_any_batch():
    model = mtp_model(2, noise=0.3)
    engine = EarlyExitEngine(model.segmented, max_batch_size=3)
    prompts = [TEXT[start : start + 4 + start % 3] for start in range(5)]
    params = [drafting(temperature=1.0, seed=seed, draft_confidence=None) for seed in range(5)]
    together = engine.generate(prompts, params)
    for prompt, one, found in zip(prompts, params, together, strict=True):
        (alone,) = EarlyExitEngine(model.segmented).generate([prompt], one)
        assert alone.token_ids == found.token_ids


def test_weights_that_are_not_finite_end_the_request_alone():
    model = mtp_model(1)
    weights = {**model.weights, "mtp.layers.0.enorm.weight": model.weights[ENORM] * float("nan")}
    engine = EarlyExitEngine(TinyModel(model.architecture, model.early_exit, weights).segmented)
    broken, other = engine.generate([PROMPT] * 2, [drafting(), SamplingParams(max_tokens=6)])
    assert broken.finish_reason == "error"
    assert other.token_ids == [token.token_id for token in generate(model, PROMPT, 6, None)]
    (after,) = engine.generate([PROMPT], SamplingParams(max_tokens=6))
    assert after.token_ids == other.token_ids


ENORM = "mtp.layers.0.enorm.weight"


def test_what_there_is_not_is_refused():
    without = EarlyExitEngine(mtp_model(1, exits=(2,)).segmented)
    without._requests.mtp_costs = None
    with pytest.raises(FieldError, match=r"draft_method 'mtp' needs a multi-token.*exit or auto"):
        without.generate([PROMPT], drafting())
    # Whoever leaves the choice gets what there is.
    (result,) = without.generate([PROMPT], SamplingParams(mode="self_speculative"))
    assert result.statistics.drafts is not None
    assert result.statistics.drafts.mtp_drafted == 0
    with pytest.raises(FieldError, match="draft_exit_layer 2 has no effect with draft_method"):
        drafting(draft_exit_layer=2)
    with pytest.raises(FieldError, match=r"draft_method 'eagle' .*exit or mtp or auto"):
        SamplingParams(mode="self_speculative", draft_method="eagle")
    with pytest.raises(FieldError, match="draft_method 'mtp' has no effect with mode='full'"):
        SamplingParams(draft_method="mtp")
