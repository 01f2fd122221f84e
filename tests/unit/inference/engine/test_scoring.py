"""Scores of a prompt: what the engine itself would say in each place, without holding up others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine import scoring
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from megatron.early_exit.inference.results import PromptToken
from tests.helpers.reference_decoder import scores
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, make_model

TEXT = [position * 7 % 61 for position in range(23)]
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=3)
MODEL = make_model(exits=(1, 3), use_exit_norm=True)


@pytest.fixture(autouse=True)
def small_chunk(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 5)


def early_exit(threshold: float, exit_layers: tuple[int, ...] | None = None) -> SamplingParams:
    return replace(
        SCORED, mode="early_exit", early_exit_threshold=threshold, exit_layers=exit_layers
    )


def assert_what_the_engine_says(engine: EarlyExitEngine, params: SamplingParams) -> list[int]:
    """Compare with a token generated behind every prefix; returns the layers of the scores."""
    (result,) = engine.generate([TEXT], params)
    first, *scores = result.prompt_tokens
    assert first == PromptToken(TEXT[0], None)
    prefixes = [TEXT[:length] for length in range(1, len(TEXT))]
    one = replace(params, max_tokens=1, prompt_logprobs=None, logprobs=LLAMA.vocab_size)
    for token, score, said in zip(TEXT[1:], scores, engine.generate(prefixes, one), strict=True):
        expected = dict(said.top_logprobs[0])
        assert score.token_id == token
        assert score.logprob == pytest.approx(expected[token], abs=1e-4)
        assert score.confidence == pytest.approx(said.confidences[0], rel=1e-4)
        assert [value for _, value in score.top_logprobs] == pytest.approx(
            sorted(expected.values(), reverse=True)[:3], abs=1e-4
        )
        if params.mode == "early_exit":
            assert score.exit_layer == said.exit_layers[0]
    return [score.exit_layer for score in scores]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_head_kind(architecture, heads):
    engine = EarlyExitEngine(make_model(architecture, exits=(1, 3), **heads).segmented)
    layers = [
        assert_what_the_engine_says(engine, early_exit(threshold))
        for threshold in (0.0, 0.2, 0.4, 0.6, 0.9, 1.0)
    ]
    assert set(layers[0]) == {1}
    assert any(len(set(mixed)) > 1 for mixed in layers), "a threshold should mix the heads"
    for layer in (1, 3):
        alone = assert_what_the_engine_says(engine, early_exit(0.0, (layer,)))
        assert set(alone) == {layer}
        assert_what_the_engine_says(engine, early_exit(0.5, (layer,)))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_exit_beside_the_final_head(heads):
    engine = EarlyExitEngine(make_model(exits=(2, 4), **heads).segmented)
    for threshold in (0.0, 0.5):
        assert_what_the_engine_says(engine, early_exit(threshold))


@pytest.mark.parametrize("fields", [{}, {"mode": "self_speculative", "draft_exit_layer": 3}])
def test_other_modes_stay_with_the_final_head(fields):
    layers = assert_what_the_engine_says(
        EarlyExitEngine(MODEL.segmented), replace(SCORED, **fields)
    )
    assert set(layers) == {4}


def test_an_exit_of_few_answers_gives_the_others_no_probability():
    model = make_model(exits=(1,), use_exit_norm=True, exit_vocab_size=40)
    (result,) = EarlyExitEngine(model.segmented).generate([TEXT], early_exit(0.0))
    for score in result.prompt_tokens[1:]:
        assert math.isfinite(score.logprob) == (score.token_id < 40)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_positions_that_leave_are_held(architecture, heads):
    model = make_model(architecture, exits=(1, 3), **heads)
    engine = EarlyExitEngine(model.segmented)
    logprobs = []
    for threshold in (0.0, 0.4, 0.6):
        params = early_exit(threshold)
        (exact,), (result,) = (
            engine.generate([TEXT], replace(params, kv_policy=policy))
            for policy in ("exact", "propagate")
        )
        expected = scores(model, TEXT, threshold, propagates=True)
        found = result.prompt_tokens[1:]
        assert [token.exit_layer for token in found] == [token.exit_layer for token in expected]
        logprobs += [[token.logprob for token in one.prompt_tokens[1:]] for one in (exact, result)]
        assert logprobs[-1] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    assert logprobs[2] != pytest.approx(logprobs[3], abs=1e-3)


def test_layers_that_no_score_needs_are_not_run(monkeypatch):
    segments = []
    run = scoring.SegmentRunner.run

    def counted(runner, index, *args, **fields):
        segments.append(index)
        return run(runner, index, *args, **fields)

    engine = EarlyExitEngine(MODEL.segmented)
    monkeypatch.setattr(scoring.SegmentRunner, "run", counted)
    engine.generate([TEXT], early_exit(0.0, (3,)))
    assert set(segments) == {0, 1}
    engine.generate([TEXT], early_exit(0.5, (3,)))
    assert set(segments) == {0, 1, 2}


def test_scoring_takes_turns_with_decoding():
    engine = EarlyExitEngine(MODEL.segmented)
    params = SamplingParams(max_tokens=20)
    (alone,) = engine.generate([[1, 2]], params)
    decoding = engine.submit([1, 2], params)
    scored = engine.submit(TEXT, SamplingParams(max_tokens=2, prompt_logprobs=0))
    last = engine.submit(TEXT[:6], SCORED)
    for number in range(1, 6):
        assert scored.prompt_tokens is None
        assert not scored.tokens
        engine.step()
        assert len(decoding.tokens) == number
    assert [one.token_id for one in scored.prompt_tokens] == TEXT
    while not (decoding.is_finished and scored.is_finished and last.is_finished):
        engine.step()
    assert decoding.result().token_ids == alone.token_ids
    assert scored.result().finish_reason == last.result().finish_reason == "length"
    assert scored.result().token_ids == engine.generate([TEXT], SamplingParams())[0].token_ids[:2]
    assert last.result().prompt_tokens == engine.generate([TEXT[:6]], SCORED)[0].prompt_tokens
    assert last.result().token_ids == []


def test_scores_alone_come_with_steps():
    engine = EarlyExitEngine(MODEL.segmented)
    request = engine.submit(TEXT, SCORED)
    steps = 0
    while not request.is_finished:
        assert engine.step() == []
        steps += 1
    assert steps == 5
    assert request.result().prompt_tokens == engine.generate([TEXT], SCORED)[0].prompt_tokens
    assert list(engine.stream(TEXT, SCORED)) == []


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_text_that_nobody_wants_any_more_is_not_scored(num_steps):
    engine = EarlyExitEngine(MODEL.segmented)
    given_up, other = engine.submit(TEXT, SCORED), engine.submit(TEXT, SCORED)
    for _ in range(num_steps):
        engine.step()
    engine.cancel(given_up)
    result = given_up.result()
    assert (result.finish_reason, result.prompt_tokens) == ("cancelled", None)
    assert list(engine.loop.unscored) == [other.key]
    steps = 0
    while not other.is_finished:
        engine.step()
        steps += 1
    assert steps == 5
    assert not engine.loop.requests
    assert not engine.loop.unscored


def test_damaged_weights_end_the_scoring():
    broken = make_model(exits=(1,), use_exit_norm=True)
    broken.weights["decoder.final_layernorm.weight"].fill_(math.nan)
    engine = EarlyExitEngine(broken.segmented)
    request = engine.submit(TEXT, replace(SCORED, max_tokens=3))
    engine.step()
    result = request.result()
    assert (result.error, result.prompt_tokens, result.token_ids) == (NOT_FINITE, None, [])
    assert not engine.loop.requests
    (well,) = engine.generate([TEXT], early_exit(0.0))
    assert all(math.isfinite(score.logprob) for score in well.prompt_tokens[1:])
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.argmax_tokens(TEXT)
