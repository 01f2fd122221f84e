"""The engine against the oracle without caches: same tokens, exits, confidences."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.config import KVPolicy
from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs, Policy
from tests.helpers.reference_decoder import (
    all_heads,
    all_logits,
    confidence_of,
    generate,
    scores,
)
from tests.helpers.tiny_models import ARCHITECTURES, GPT2, HEADS, LLAMA, TinyModel, make_model

PROMPT = [5, 17, 3, 44, 8]
THRESHOLDS = [0.0, 0.3, 0.6, 0.9, 1.0, None]


def run(
    model: TinyModel,
    prompt: list[int],
    max_tokens: int,
    threshold: float | None,
    exit_layers: tuple[int, ...] | None = None,
    max_pending: int = 64,
    kv_policy: KVPolicy = "exact",
) -> GenerationResult:
    if threshold is None:
        params = SamplingParams(max_tokens=max_tokens)
    else:
        params = SamplingParams(
            max_tokens=max_tokens,
            mode="early_exit",
            early_exit_threshold=threshold,
            exit_layers=exit_layers,
            kv_policy=kv_policy,
        )
    engine = EarlyExitEngine(model.segmented, max_pending=max_pending)
    return engine.generate([prompt], params)[0]


def assert_equals_oracle(
    model: TinyModel,
    prompt: list[int],
    max_tokens: int,
    threshold: float | None,
    exit_layers: tuple[int, ...] | None = None,
    max_pending: int = 64,
    kv_policy: KVPolicy = "exact",
) -> GenerationResult:
    result = run(model, prompt, max_tokens, threshold, exit_layers, max_pending, kv_policy)
    propagates = kv_policy == "propagate"
    expected = generate(model, prompt, max_tokens, threshold, exit_layers, propagates=propagates)
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)
    assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)
    return result


@pytest.mark.parametrize("kv_policy", get_args(KVPolicy))
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_head_kind_and_threshold(architecture, heads, threshold, kv_policy):
    model = make_model(architecture, exits=(1, 3), **heads)
    if threshold is None and kv_policy != "exact":
        pytest.skip("nothing leaves")
    result = assert_equals_oracle(model, PROMPT, 24, threshold, kv_policy=kv_policy)
    if threshold == 0.0:
        assert set(result.exit_layers) == {1}
    if threshold is None:
        assert set(result.exit_layers) == {4}


MEASURED = {
    "margin": (0.05, 0.3, 0.7),
    "entropy": (0.2, 0.4, 0.7),
    "similarity": (0.3, 0.5, 0.8),
}
"""Thresholds between what exits are sure of by each measure."""
NUM_MEASURED = 7


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_every_head_kind_and_measure(heads, measure):
    """A batch of sequences, each with a rule of its own; their prompts are scored by it, too."""
    model = make_model(exits=(1, 2, 3), **heads)
    low, middle, high = MEASURED[measure]
    rules: list[dict[str, Any]] = [
        {"threshold": low, "measure": measure},
        {"threshold": middle, "measure": measure, "exit_layers": (3,)},
        {"threshold": (high, low), "measure": measure, "exit_layers": (1, 3)},
        {"threshold": (high, middle, low), "measure": measure, "decay": 4.0},
        {"threshold": 0.5, "decay": 1.0},
        {"threshold": middle, "measure": measure, "propagates": True},
    ]
    engine = EarlyExitEngine(model.segmented)
    layers = set()
    results = engine.generate([PROMPT] * len(rules), [params_of(rule) for rule in rules])
    for rule, result in zip(rules, results, strict=True):
        expected = generate(model, PROMPT, NUM_MEASURED, **rule)
        assert result.token_ids == [token.token_id for token in expected]
        assert result.exit_layers == [token.exit_layer for token in expected]
        assert result.confidences == pytest.approx(
            [token.confidence for token in expected], rel=2e-4, abs=1e-5
        )
        scored = result.prompt_tokens[1:]
        known = scores(model, PROMPT, **rule)
        assert [token.exit_layer for token in scored] == [token.exit_layer for token in known]
        assert [token.confidence for token in scored] == pytest.approx(
            [token.confidence for token in known], rel=2e-4, abs=1e-5
        )
        layers |= set(result.exit_layers)
    assert len(layers) > 2, "the thresholds should mix exits and full passes"


@pytest.mark.parametrize(("asked", "threshold"), [((), 0.5), ((1,), 0.4), ((3,), 0.8)])
def test_hidden_states_are_compared_with_those_of_exits_that_are_not_asked(asked, threshold):
    model = make_model(exits=(1, 2, 3), use_exit_norm=True)
    rule = {"threshold": threshold, "measure": "similarity", "exit_layers": asked}
    (result,) = EarlyExitEngine(model.segmented).generate([PROMPT], params_of(rule))
    expected = generate(model, PROMPT, NUM_MEASURED, **rule)
    assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)
    assert {token.exit_layer for token in expected} == {*asked, 4}


def params_of(rule: dict[str, Any]) -> SamplingParams:
    """A request by a rule of the reference decoder."""
    threshold = rule["threshold"]
    name = "exit_thresholds" if isinstance(threshold, tuple) else "early_exit_threshold"
    return SamplingParams(
        max_tokens=NUM_MEASURED,
        prompt_logprobs=0,
        mode="early_exit",
        exit_layers=rule.get("exit_layers"),
        exit_measure=rule.get("measure"),
        exit_threshold_decay=rule.get("decay", 0.0),
        kv_policy="propagate" if rule.get("propagates") else "exact",
        **{name: threshold},
    )


def test_every_head_on_the_way_is_judged_by_the_measure_of_the_request():
    model = make_model(exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    heads = all_heads(model, PROMPT)
    for measure in MEASURED:
        params = SamplingParams(
            max_tokens=1,
            mode="early_exit",
            early_exit_threshold=1.0,
            exit_measure=measure,
            exit_details=True,
        )
        (result,) = engine.generate([PROMPT], params)
        found = [head.confidence for head in result.heads[0]]
        expected = [confidence_of(head, -1, measure) for head in heads.values()]
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_the_stored_measure_applies_where_a_request_has_none():
    model = make_model(exits=(1, 3), use_exit_norm=True, exit_measure="entropy")
    engine = EarlyExitEngine(model.segmented)
    params = SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.4)
    other = replace(params, exit_measure="margin")
    for one, measure in ((params, "entropy"), (other, "margin")):
        (result,) = engine.generate([PROMPT], one)
        expected = generate(model, PROMPT, 8, 0.4, measure=measure)
        assert result.exit_layers == [token.exit_layer for token in expected]
        assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)
    # Other modes have the confidence that they always had.
    (full,) = engine.generate([PROMPT], SamplingParams(max_tokens=8))
    assert full.confidences == pytest.approx(
        [token.confidence for token in generate(model, PROMPT, 8, None)], rel=2e-4
    )


def test_a_wrong_number_of_thresholds_is_refused():
    engine = EarlyExitEngine(make_model(exits=(1, 2, 3)).segmented)
    params = SamplingParams(mode="early_exit", exit_thresholds=(0.5, 0.5), exit_layers=(3, 1))
    engine.generate([PROMPT], params)
    for wrong, named in (
        (replace(params, exit_layers=None), r"allowed: 3, one for each exit that is used \(1 2 3"),
        (replace(params, exit_layers=(2,)), r"allowed: 1, one for each exit that is used \(2\)"),
    ):
        with pytest.raises(FieldError, match=r"exit_thresholds \(0.5, 0.5\) has 2 .*" + named):
            engine.generate([PROMPT], wrong)


@pytest.mark.parametrize("kv_policy", get_args(KVPolicy))
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture(architecture, kv_policy):
    model = make_model(architecture, exits=(1, 2), use_exit_norm=True)
    result = assert_equals_oracle(model, PROMPT, 24, 0.8, kv_policy=kv_policy)
    assert len(set(result.exit_layers)) > 1, "the threshold should mix exits and full passes"


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_exit_beside_the_final_head(heads):
    model = make_model(exits=(2, 4), **heads)
    for threshold in (0.0, 0.6, 0.9):
        for kv_policy in get_args(KVPolicy):
            assert_equals_oracle(model, PROMPT, 24, threshold, kv_policy=kv_policy)


def test_exit_before_its_layer_is_the_exit_behind_the_one_before():
    before = make_model(exits=(2, 4), pre_exit=True, use_exit_norm=True)
    behind = make_model(exits=(1, 3), use_exit_norm=True)
    assert run(before, PROMPT, 24, 0.8).token_ids == run(behind, PROMPT, 24, 0.8).token_ids
    assert set(run(before, PROMPT, 24, 0.8).exit_layers) <= {1, 3, 4}


@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(0, LLAMA.vocab_size - 1), min_size=1, max_size=12),
    max_tokens=st.integers(1, 20),
    threshold=st.floats(0, 1),
    exit_layers=st.sets(st.sampled_from([1, 2, 3, 4])),
    max_pending=st.integers(1, 8),
    heads=st.sampled_from(sorted(HEADS)),
    seed=st.integers(0, 3),
    kv_policy=st.sampled_from(get_args(KVPolicy)),
)
def test_pending_positions_never_show(
    prompt, max_tokens, threshold, exit_layers, max_pending, heads, seed, kv_policy
):
    model = make_model(exits=(1, 2, 3, 4), seed=seed, **HEADS[heads])
    chosen = tuple(sorted(exit_layers))
    assert_equals_oracle(model, prompt, max_tokens, threshold, chosen, max_pending, kv_policy)


def test_low_precision_stays_close():
    model = make_model(exits=(1, 3), use_exit_norm=True)
    low = make_model(exits=(1, 3), use_exit_norm=True, dtype=torch.bfloat16)
    full = run(model, PROMPT, 1, None)
    close = run(low, PROMPT, 1, None)
    assert close.logprobs == pytest.approx(full.logprobs, abs=0.1)


def test_argmax_tokens_are_the_full_models():
    model = make_model(exits=(1, 3), use_exit_mlp=True)
    tokens = PROMPT * 8
    expected = all_logits(model, tokens)["final"].argmax(-1).tolist()
    assert EarlyExitEngine(model.segmented).argmax_tokens(tokens) == expected


@pytest.mark.parametrize("heads", ["norm", "block"])
def test_positions_that_ran_on_before_they_left_are_held_all_the_same(heads):
    """Where questions are dear, exits are asked together with the heads behind them."""
    model = make_model(exits=(1, 2, 3), **HEADS[heads])
    engine = EarlyExitEngine(model.segmented)
    engine.loop.scheduler._policy = Policy(Costs((1.0,) * 4, head=50.0, exit_head=50.0))
    for threshold in (0.4, 0.6, 0.8):
        leaving = {"mode": "early_exit", "early_exit_threshold": threshold}
        params = SamplingParams(max_tokens=24, kv_policy="propagate", **leaving)
        (result,) = engine.generate([PROMPT], params)
        expected = generate(model, PROMPT, 24, threshold, propagates=True)
        assert result.token_ids == [token.token_id for token in expected]
        assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)
