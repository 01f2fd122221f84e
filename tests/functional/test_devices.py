"""Every model, head and mode on a device against the oracle: some on the CPU, all on a GPU."""

from dataclasses import replace

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.reference_decoder import generate, scores
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, make_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMPTS = [[5, 17, 3, 44, 8], [7], [9, 9, 2]]
MODES = {
    "full": (SamplingParams(max_tokens=20), None),
    "early_exit": (
        SamplingParams(max_tokens=20, mode="early_exit", early_exit_threshold=0.3),
        0.3,
    ),
    "self_speculative": (
        SamplingParams(max_tokens=20, mode="self_speculative", draft_confidence=0.0),
        None,
    ),
}


def on(device, architecture, heads, is_compiled=False, dtype=torch.float32):
    """The model on the CPU for the oracle, and on the device. The compiler takes seconds for each
    layer of a stretch, so there are fewer for it."""
    shape, exits = ARCHITECTURES[architecture], (1, 3)
    if is_compiled:
        shape, exits = replace(shape, num_layers=2), (1,)
    model = make_model(shape, exits=exits, dtype=dtype, **HEADS[heads])
    weights = {name: tensor.to(device) for name, tensor in model.weights.items()}
    segmented = SegmentedModel(model.architecture, model.early_exit, weights, None, is_compiled)
    return model, segmented


def check(device, architecture, heads, modes, is_compiled=False):
    model, segmented = on(device, architecture, heads, is_compiled)
    engine = EarlyExitEngine(segmented)
    for mode in modes:
        check_mode(engine, model, mode)


def check_mode(engine, model, mode):
    params, threshold = MODES[mode]
    for results in (engine.generate(PROMPTS, params), engine.generate(PROMPTS[:1], params)):
        for prompt, result in zip(PROMPTS, results, strict=False):
            expected = generate(model, prompt, params.max_tokens, threshold)
            assert result.token_ids == [token.token_id for token in expected]
            assert result.exit_layers == [token.exit_layer for token in expected]
            assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)


def check_half_precision(device, architecture, mode, is_compiled=False):
    """The log-probabilities of the tokens that were chosen, by the same weights in fp32."""
    model, segmented = on(device, architecture, "norm", is_compiled, torch.bfloat16)
    exact = replace(model, weights={name: one.float() for name, one in model.weights.items()})
    params, _ = MODES[mode]
    for prompt, result in zip(
        PROMPTS, EarlyExitEngine(segmented).generate(PROMPTS, params), strict=True
    ):
        expected = scores(exact, [*prompt, *result.token_ids], None)[len(prompt) - 1 :]
        assert result.logprobs == pytest.approx([token.logprob for token in expected], abs=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_on_a_cpu(mode):
    check(CPU, "llama", "all", [mode])


def test_half_precision_on_a_cpu():
    check_half_precision(CPU, "llama", "full")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_layers_on_a_gpu(architecture, heads, mode):
    check(CUDA, architecture, heads, [mode])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("architecture", "heads"),
    [*((one, "norm") for one in ARCHITECTURES), *(("llama", one) for one in HEADS)],
)
def test_captured_layers_on_a_gpu(architecture, heads):
    check(CUDA, architecture, heads, MODES, is_compiled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("mode", ["full", "self_speculative"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen"])
def test_half_precision_on_a_gpu(architecture, mode, is_compiled):
    check_half_precision(CUDA, architecture, mode, is_compiled)
