"""Megatron Bridge's checkpoints: the same weights, with the model's shape in a file of its own."""

from dataclasses import replace

import pytest
import torch

from megatron.early_exit.checkpoint.bridge import bridge_args
from megatron.early_exit.checkpoint.description import read_description
from megatron.early_exit.checkpoint.exits import add_exits
from megatron.early_exit.checkpoint.inspection import inspect
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.config import EarlyExitConfig
from tests.helpers import saved_checkpoint
from tests.helpers.tiny_models import ARCHITECTURES, LLAMA, make_model

# Some lines of a run_config.yaml as Bridge prints it, for the numbers of LLAMA.
RUN_CONFIG = """\
mixed_precision:
  _target_: megatron.bridge.training.mixed_precision.MixedPrecisionConfig
  bf16: true
model:
  _target_: megatron.bridge.models.llama.llama_provider.Llama31ModelProvider
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  activation_func_clamp_value: null
  add_bias_linear: false
  add_qkv_bias: false
  apply_residual_connection_post_layernorm: false
  attention_backend:
    _args_:
    - 5
    _call_: true
    _target_: megatron.core.transformer.enums.AttnBackend
  bias_activation_fusion: true
  expert_model_parallel_size: 1
  ffn_hidden_size: 48
  fp32_residual_connection: false
  gated_linear_unit: true
  glu_linear_offset: 0.0
  hidden_size: 32
  high_freq_factor: 4.0
  init_method_std: 0.02
  kv_channels: 8
  layernorm_epsilon: 1.0e-05
  layernorm_zero_centered_gamma: false
  low_freq_factor: 1.0
  mtp_num_layers: null
  multi_latent_attention: false
  no_rope_freq: null
  normalization: RMSNorm
  num_attention_heads: 4
  num_layers: 4
  num_moe_experts: null
  num_query_groups: 2
  old_context_len: 8192
  params_dtype:
    _call_: false
    _target_: torch.float32
  pipeline_model_parallel_size: 1
  position_embedding_type: rope
  qk_layernorm: false
  rotary_base: 500000.0
  rotary_interleaved: false
  rotary_percent: 1.0
  scale_factor: 32.0
  seq_len_interpolation_factor: null
  seq_length: 64
  share_embeddings_and_output_weights: false
  softmax_scale: null
  softmax_type: vanilla
  tensor_model_parallel_size: 2
  vocab_size: 61
  window_size: null
tokenizer:
  _target_: megatron.bridge.training.tokenizers.config.TokenizerConfig
  tokenizer_model: null
  tokenizer_type: NullTokenizer
"""
SHAPE = replace(LLAMA, rotary_base=500000.0, rope_scaling_factor=32.0)


def changed(*lines):
    """RUN_CONFIG with other values."""
    text = RUN_CONFIG
    for line in lines:
        name = line.partition(":")[0]
        (old,) = (one for one in text.splitlines() if one.strip().startswith(f"{name}:"))
        text = text.replace(old, f"  {line}")
    return text


def save_bridge(save_dir, model, text):
    padded = {
        name: torch.cat((tensor, torch.full((3, tensor.shape[1]), 9.0)))
        for name, tensor in model.weights.items()
        if tensor.dim() == 2 and len(tensor) == 61
    }
    path = saved_checkpoint.save(save_dir, 10, {**model.weights, **padded})
    torch.save({"iteration": 10, "checkpoint_version": 3.0}, path / "common.pt")
    (path / "run_config.yaml").write_text(text)
    return path


def test_exits_are_added_to_it(tmp_path):
    model = make_model(SHAPE)
    path = save_bridge(tmp_path / "bridge", model, RUN_CONFIG)
    assert read_description(path).architecture == SHAPE
    assert read_description(tmp_path / "bridge").early_exit == EarlyExitConfig()
    assert inspect(path).layout == {"tensor": 2, "pipeline": 1, "expert": 1}
    wanted = EarlyExitConfig(exit_layer_nums=(2,), use_exit_mlp=True)
    add_exits(open_checkpoint(path), wanted).write(tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.description.architecture == SHAPE
    assert found.args is not None
    assert found.args.exit_layer_nums == [2]
    for name, tensor in model.weights.items():
        assert torch.equal(found.weights[name].read(), tensor), name


@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        (["scale_factor: null"], {"rope_scaling_factor": None}),
        (["scale_factor: null", "no_rope_freq: null\n  rope_scaling: true"], {"factor": 8.0}),
        (["num_query_groups: null"], {"num_query_groups": 4}),
        (["share_embeddings_and_output_weights: true"], {"tied": True}),
        (
            ["qk_layernorm: true", "add_qkv_bias: true"],
            {"qk_layernorm": True, "add_qkv_bias": True},
        ),
    ],
)
def test_fields_are_read(tmp_path, lines, shape):
    names = {"factor": "rope_scaling_factor", "tied": "share_embeddings_and_output_weights"}
    shape = {names.get(name, name): value for name, value in shape.items()}
    path = save_bridge(tmp_path, make_model(SHAPE), changed(*lines))
    assert read_description(path).architecture == replace(SHAPE, **shape)


def test_activations_are_read(tmp_path):
    path = save_bridge(tmp_path, make_model(SHAPE), RUN_CONFIG)

    def activation(function, gated, *more):
        text = changed(f"gated_linear_unit: {gated}", *more).replace("functional.silu", function)
        (path / "run_config.yaml").write_text(text)
        architecture = read_description(path).architecture
        return architecture.activation, architecture.gated_linear_unit

    bias = "add_bias_linear: true"
    assert activation("functional.gelu", "false") == ("gelu", False)
    assert activation("functional.gelu", "false", bias) == ("gelu_tanh", False)
    assert activation("fused.squared_relu", "false") == ("squared_relu", False)
    assert activation("fused.quick_gelu", "true") == ("quick_gelu", True)
    with pytest.raises(ValueError, match="activation_func gelu in a gated MLP is not supported"):
        activation("functional.gelu", "true")


def test_a_tokenizer_beside_the_weights_is_taken(tmp_path):
    text = RUN_CONFIG.replace("NullTokenizer", "HuggingFaceTokenizer")
    path = save_bridge(tmp_path, make_model(ARCHITECTURES["llama3"]), text)
    assert bridge_args(path).tokenizer_model is None
    (path / "tokenizer").mkdir()
    assert bridge_args(path).tokenizer_model == str(path / "tokenizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read as YAML without objects"),
        ("model: !!python/object/apply:os.system [touch ran]", "cannot be read as YAML without"),
        ("train: {}", "has no model section"),
        (changed("num_moe_experts: 8"), "--num-experts 8 is not supported by inference"),
        (changed("hidden_size: null"), "does not say hidden_size of the model"),
        (changed("vocab_size: null"), "does not say vocab_size of the model"),
        (changed("high_freq_factor: 2.0"), "high_freq_factor 2.0 is not supported, allowed: 4.0"),
        (RUN_CONFIG.replace("models.llama.", "models.gemma."), "is not supported, allowed: those"),
        (RUN_CONFIG.replace("torch.float32", "torch.load"), "params_dtype load is not known"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, text, message):
    path = save_bridge(tmp_path, make_model(SHAPE), text)
    with pytest.raises(ValueError, match=message):
        read_description(path)
