"""The arguments that Megatron would have stored with a model.

Megatron compares them when it loads a checkpoint, and `--use-checkpoint-args` builds a model from
them.
"""

from argparse import Namespace
from typing import Any

import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import ModelDescription

_PLAIN = (int, float, str, bool, type(None), torch.dtype)
_SAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma"),
    *("add_bias_linear", "add_qkv_bias", "qk_layernorm", "softmax_scale"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
    "rotary_seq_len_interpolation_factor",
)
"""Fields of an `Architecture` that are Megatron's arguments of the same names."""


def plain_args(args: object) -> Namespace:
    """Those arguments of a checkpoint that can be stored again: numbers, texts, lists of them.

    Values of Megatron's own types are left out, and Megatron takes its defaults for them.
    """
    return Namespace(**{name: value for name, value in vars(args).items() if _is_plain(value)})


def with_description(args: Namespace | None, description: ModelDescription) -> Namespace | None:
    """The arguments of the same backbone with the exits and the multi-token-prediction module that
    `description` has; None where there are none."""
    if args is None:
        return None
    architecture = description.architecture
    assert architecture is not None
    own = {**description.early_exit.to_dict(), **_mtp_args(architecture)}
    return Namespace(**{**vars(args), **own})


def _mtp_args(a: Architecture) -> dict[str, Any]:
    return {
        # Megatron builds an empty module for 0.
        "mtp_num_layers": a.mtp_num_layers or None,
        "mtp_use_repeated_layer": a.mtp_use_repeated_layer,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return type(value) in _PLAIN


def described_args(description: ModelDescription) -> Namespace:
    """Megatron's arguments for a model that Megatron has not trained."""
    architecture, tokenizer = description.architecture, description.tokenizer
    assert architecture is not None
    args = {**_backbone_args(architecture), **description.early_exit.to_dict()}
    args |= {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "use_distributed_optimizer": False,
        "ckpt_format": "torch_dist",
    }
    if tokenizer is not None:
        args |= {
            "tokenizer_type": tokenizer.type,
            "tokenizer_model": tokenizer.model,
            "tokenizer_sentencepiece_ignore_extra_whitespaces": not tokenizer.keeps_extra_spaces,
            "tokenizer_sentencepiece_legacy": tokenizer.legacy,
            "tokenizer_hf_no_include_special_tokens": not tokenizer.adds_special_tokens,
        }
    return Namespace(**args)


def _backbone_args(a: Architecture) -> dict[str, Any]:
    dtype = getattr(torch, a.params_dtype)
    return {
        **{name: getattr(a, name) for name in _SAME},
        **_mtp_args(a),
        "encoder_num_layers": a.num_layers,
        "group_query_attention": a.num_query_groups != a.num_attention_heads,
        "padded_vocab_size": a.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "seq_length": a.max_position_embeddings,
        "norm_epsilon": a.layernorm_epsilon,
        "swiglu": a.activation == "silu" and a.gated_linear_unit,
        "squared_relu": a.activation == "squared_relu",
        "quick_geglu": a.activation == "quick_gelu",
        "bias_gelu_fusion": a.activation == "gelu_tanh",
        # Exits that are tuned on such a model have as much as it has.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_position_embedding": a.position_embedding_type == "learned_absolute",
        "use_rope_scaling": a.rope_scaling_factor is not None,
        "rope_scaling_factor": a.rope_scaling_factor or 8.0,
        "untie_embeddings_and_output_weights": not a.share_embeddings_and_output_weights,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
