"""Engines with weights in 8 bits compute what the oracle computes with the rounded weights."""

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.weight_dtype import make_quantizer
from tests.helpers.quantized_models import quantized_model, rounded_model
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import (
    ARCHITECTURES,
    GPT2,
    HEADS,
    LLAMA,
    make_model,
)
from tests.helpers.written_checkpoint import write_model

PROMPT = [5, 17, 3, 44, 8]
PROMPTS = [PROMPT, [7], [9, 9, 2]]
LEAVING = {"mode": "early_exit"}
DRAFTING = {"mode": "self_speculative", "draft_confidence": 0.0}


def assert_oracle(model, engine, threshold, num_tokens=20):
    params = SamplingParams(max_tokens=num_tokens)
    if threshold is not None:
        params = SamplingParams(max_tokens=num_tokens, early_exit_threshold=threshold, **LEAVING)
    (result,) = engine.generate([PROMPT], params)
    expected = generate(model, PROMPT, num_tokens, threshold)
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=1e-2)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_kind_of_head(architecture, heads):
    model = make_model(architecture, exits=(1, 3), **heads)
    engine = EarlyExitEngine(quantized_model(model))
    for threshold in (0.6, None):
        assert_oracle(rounded_model(model), engine, threshold)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture(architecture):
    model = make_model(architecture, exits=(1, 2), use_exit_norm=True)
    engine = EarlyExitEngine(quantized_model(model))
    assert_oracle(rounded_model(model), engine, 0.8)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["untied", "tied"])
def test_heads_may_keep_their_format(architecture):
    model = make_model(architecture, exits=(1,), use_exit_norm=True)
    engine = EarlyExitEngine(quantized_model(model, heads=False))
    assert_oracle(rounded_model(model, heads=False), engine, 0.6)
    whole = EarlyExitEngine(quantized_model(model)).generate([PROMPT])[0].logprobs
    assert engine.generate([PROMPT])[0].logprobs != pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_positions_that_are_held(architecture):
    """Their keys and values are those of the rounded weights, too."""
    model = make_model(architecture, exits=(1, 2), use_exit_norm=True)
    engine = EarlyExitEngine(quantized_model(model))
    params = SamplingParams(
        max_tokens=20, early_exit_threshold=0.8, kv_policy="propagate", **LEAVING
    )
    (result,) = engine.generate([PROMPT], params)
    expected = generate(rounded_model(model), PROMPT, 20, 0.8, propagates=True)
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=1e-2)
    assert len(set(result.exit_layers)) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen"])
def test_held_positions_take_activations_of_16_bits(name):
    """Biases and caches are in their format, and several sequences are held at once."""
    model = make_model(ARCHITECTURES[name], exits=(1, 2), use_exit_norm=True)
    quantizer = make_quantizer("int8", True, torch.bfloat16, torch.device("cpu"))
    assert quantizer is not None
    weights = quantizer.of_model(model.weights)
    engine = EarlyExitEngine(SegmentedModel(model.architecture, model.early_exit, weights))
    params = SamplingParams(
        max_tokens=12, early_exit_threshold=0.5, kv_policy="propagate", **LEAVING
    )
    together = engine.generate(PROMPTS, params)
    assert [one.finish_reason for one in together] == ["length"] * 3
    assert len({layer for one in together for layer in one.exit_layers}) > 1


@pytest.mark.parametrize("heads", ["norm", "block"])
def test_batches_of_all_modes(heads):
    """The text of a request is the same in any company."""
    model = make_model(exits=(1, 3), **HEADS[heads])
    kinds = [{}, {**LEAVING, "early_exit_threshold": 0.5}, DRAFTING]
    engine = EarlyExitEngine(quantized_model(model), max_batch_size=9, max_pending=6)
    prompts = [prompt for prompt in PROMPTS for _ in kinds]
    params = [SamplingParams(max_tokens=12, **kind) for _ in PROMPTS for kind in kinds]
    together = engine.generate(prompts, params)
    oracle = {
        (number, threshold): generate(rounded_model(model), prompt, 12, threshold)
        for number, prompt in enumerate(PROMPTS)
        for threshold in (0.5, None)
    }
    for number, result in enumerate(together):
        prompt, one = prompts[number], params[number]
        (alone,) = engine.generate([prompt], one)
        assert result.token_ids == alone.token_ids
        assert result.exit_layers == alone.exit_layers
        threshold = 0.5 if one.mode == "early_exit" else None
        expected = oracle[number // len(kinds), threshold]
        assert result.token_ids == [token.token_id for token in expected]


def test_loaded_from_a_checkpoint(tmp_path):
    model = make_model(GPT2, exits=(2,), use_exit_norm=True)
    write_model(tmp_path, model)
    engine = EarlyExitEngine.from_checkpoint(tmp_path, weight_dtype="int8")
    assert engine.model.dtype == torch.float32
    assert_oracle(rounded_model(model), engine, 0.6)
    engine = EarlyExitEngine.from_checkpoint(tmp_path, weight_dtype="int8", quantize_heads=False)
    assert_oracle(rounded_model(model, heads=False), engine, 0.6)


def test_scales_keep_their_precision_in_half_precision(tmp_path):
    model = make_model(LLAMA, exits=(2,), dtype=torch.bfloat16)
    quantizer = make_quantizer("int8", True, torch.bfloat16, torch.device("cpu"))
    kept = quantizer.of_model(model.weights)
    formats = {name: tensor.dtype for name, tensor in kept.items()}
    assert {formats.pop(n) for n in list(formats) if n.endswith("_scale")} == {torch.float32}
    assert {formats.pop(n) for n in list(formats) if n.endswith("linear_fc1.weight")} == {
        torch.int8
    }
    assert formats["embedding.word_embeddings.weight"] == torch.bfloat16
    engine = EarlyExitEngine(quantized_model(model))
    (result,) = engine.generate([PROMPT], SamplingParams(max_tokens=1))
    (expected,) = generate(rounded_model(model), PROMPT, 1, None)
    assert result.logprobs == pytest.approx([expected.logprob], abs=0.2)


@pytest.mark.parametrize(
    ("weight_dtype", "device", "message"),
    [
        ("int4", "cpu", "weight_dtype int4 is not served: .* allowed: int8"),
        ("int7", "cpu", "weight_dtype 'int7' is unknown, allowed: int8"),
        ("int8", "cuda:0", "weight_dtype int8 is not possible: .* the device cuda:0"),
    ],
)
def test_refusals(weight_dtype, device, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(weight_dtype, True, torch.float32, torch.device(device))


def test_refused_without_the_library(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    with pytest.raises(ValueError, match="weight_dtype int8 is not possible: this build of"):
        make_quantizer("int8", True, torch.float32, torch.device("cpu"))
