"""The engine against the oracle without caches: same tokens, exits, confidences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from tests.helpers.reference_decoder import all_logits, generate
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
) -> GenerationResult:
    if threshold is None:
        params = SamplingParams(max_tokens=max_tokens)
    else:
        params = SamplingParams(
            max_tokens=max_tokens,
            mode="early_exit",
            early_exit_threshold=threshold,
            exit_layers=exit_layers,
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
) -> GenerationResult:
    result = run(model, prompt, max_tokens, threshold, exit_layers, max_pending)
    expected = generate(model, prompt, max_tokens, threshold, exit_layers)
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)
    assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)
    return result


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_head_kind_and_threshold(architecture, heads, threshold):
    model = make_model(architecture, exits=(1, 3), **heads)
    result = assert_equals_oracle(model, PROMPT, 24, threshold)
    if threshold == 0.0:
        assert set(result.exit_layers) == {1}
    if threshold is None:
        assert set(result.exit_layers) == {4}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture(architecture):
    model = make_model(architecture, exits=(1, 2), use_exit_norm=True)
    result = assert_equals_oracle(model, PROMPT, 24, 0.8)
    assert len(set(result.exit_layers)) > 1, "the threshold should mix exits and full passes"


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_exit_beside_the_final_head(heads):
    model = make_model(exits=(2, 4), **heads)
    for threshold in (0.0, 0.6, 0.9):
        assert_equals_oracle(model, PROMPT, 24, threshold)


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
)
def test_pending_positions_never_show(
    prompt, max_tokens, threshold, exit_layers, max_pending, heads, seed
):
    model = make_model(exits=(1, 2, 3, 4), seed=seed, **HEADS[heads])
    chosen = tuple(sorted(exit_layers))
    assert_equals_oracle(model, prompt, max_tokens, threshold, chosen, max_pending)


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
