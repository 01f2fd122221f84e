"""Checkpoints whose matrices are stored in 8 bits."""

import json
from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.description import read_description
from megatron.early_exit.checkpoint.exits import strip_exits
from megatron.early_exit.checkpoint.huggingface import open_export
from megatron.early_exit.checkpoint.inspection import inspect
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.quantization import Quantization, quantize
from megatron.early_exit.checkpoint.quantized_model import quantize_model
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.checkpoint.weights import model_weights
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.training.resume.stored_model import StoredModel
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, make_model
from tests.helpers.written_checkpoint import write_model

PROMPTS = [[5, 17, 3, 44, 8], [7], [9, 9, 2]]
ONLY_INFERENCE = "its matrices are in 8 bits, which only inference can use, allowed: the checkpoint"


def stored(tmp_path, model, heads=True):
    """A checkpoint of a model, and one of the same in 8 bits."""
    source = write_model(tmp_path / "source", model)
    target = tmp_path / "small"
    quantize_model(open_checkpoint(source), Quantization(heads)).write(target)
    return source, target


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", [True, False])
def test_what_is_stored(tmp_path, architecture, heads):
    model = make_model(architecture, exits=(1, 3), **HEADS["all"])
    _, target = stored(tmp_path, model, heads)
    description = read_description(target)
    assert description.quantization == Quantization(heads)
    found = model_weights(locate(target), description, takes_quantized=True)
    matrices = 0
    for name, tensor in model.weights.items():
        is_head = name.endswith(("output_layer.weight", ".projection.weight"))
        is_matrix = tensor.dim() == 2 and not name.startswith("embedding.")
        if is_matrix and (heads or not is_head):
            values, scale = quantize(tensor)
            assert torch.equal(found[name].read(), values)
            assert torch.equal(found[f"{name}_scale"].read(), scale)
            matrices += 1
        else:
            assert torch.equal(found[name].read(), tensor), name
    assert len(found) == len(model.weights) + matrices


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [True, False])
def test_the_same_bits_as_quantizing_at_load(tmp_path, architecture, dtype, heads):
    shape = replace(architecture, params_dtype=str(dtype).removeprefix("torch."))
    model = make_model(shape, exits=(1, 3), dtype=dtype, use_exit_norm=True)
    source, target = stored(tmp_path, model, heads)
    at_load = EarlyExitEngine.from_checkpoint(
        source, dtype, weight_dtype="int8", quantize_heads=heads
    )
    params = [
        SamplingParams(max_tokens=8),
        SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.5),
        SamplingParams(max_tokens=8, mode="self_speculative", draft_confidence=0.0),
    ]
    expected = at_load.generate(PROMPTS, params)
    for options in ({}, {"weight_dtype": "int8"}, {"quantize_heads": heads}):
        engine = EarlyExitEngine.from_checkpoint(target, dtype, **options)
        found = engine.generate(PROMPTS, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.logprobs for one in found] == [one.logprobs for one in expected]


def test_other_options_than_those_that_are_stored(tmp_path):
    _, target = stored(tmp_path, make_model(LLAMA), heads=False)
    with pytest.raises(ValueError, match=r"quantize_heads True is not possible: .* allowed: False"):
        EarlyExitEngine.from_checkpoint(target, quantize_heads=True)
    with pytest.raises(ValueError, match="weight_dtype int4 is not served"):
        EarlyExitEngine.from_checkpoint(target, weight_dtype="int4")
    with pytest.raises(ValueError, match=r"weight_dtype int8 is not possible: .* device meta"):
        EarlyExitEngine.from_checkpoint(target, device="meta")


def test_it_takes_a_quarter_of_the_disk_but_for_the_embedding(tmp_path):
    wide = replace(LLAMA, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8)
    source, target = stored(tmp_path, make_model(replace(wide, num_query_groups=4, kv_channels=32)))
    before, after = inspect(source), inspect(target)
    assert after.size_bytes < 0.35 * before.size_bytes
    assert after.parameters == before.parameters
    assert after.dtypes == ("float32", "int8")
    assert after.quantization == {"heads": True, "weight_dtype": "int8"}
    assert before.quantization is None
    lines = [" ".join(line.split()) for line in after.lines()]
    assert any(
        line.startswith("quantized matrices of layers and of heads in int8") for line in lines
    )


def test_what_cannot_use_it_says_so(tmp_path):
    _, target = stored(tmp_path, make_model(LLAMA, exits=(1,), use_exit_norm=True))
    for use in (
        lambda: strip_exits(open_checkpoint(target)),
        lambda: open_export(target, False, None),
        lambda: quantize_model(open_checkpoint(target), Quantization()),
        lambda: StoredModel(locate(target).iteration_dir),
    ):
        with pytest.raises(ValueError, match=ONLY_INFERENCE):
            use()


def test_descriptions_that_are_damaged(tmp_path):
    _, target = stored(tmp_path, make_model(LLAMA))
    path = target / "early_exit_model.json"
    values = json.loads(path.read_text())
    assert values["format"] == 2
    for damage, message in (
        ({"heads": True, "weight_dtype": "int3"}, "weight_dtype 'int3' is unknown, allowed: int8"),
        ({"bits": 8}, "does not fit this version"),
    ):
        path.write_text(json.dumps({**values, "quantization": damage}))
        with pytest.raises(ValueError, match=message):
            read_description(target)
