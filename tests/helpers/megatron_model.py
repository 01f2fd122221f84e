"""Backbones that Megatron builds, their shapes for inference, and the logits of all their heads."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from tests.helpers.exit_models import HEADS, HIDDEN, LAYERS, SEQUENCE, VOCAB

BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"tied": False, "num_query_groups": 2, "add_qkv_bias": True, "qk_layernorm": True},
    "gpt": {
        "tied": True,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "activation_func": functional.gelu,
        "rotary_interleaved": True,
        "layernorm_zero_centered_gamma": True,
    },
}


def architecture(backbone: dict[str, Any]) -> Architecture:
    gated = backbone.get("gated_linear_unit", True)
    return Architecture(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=4 * HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=backbone.get("num_query_groups", HEADS),
        kv_channels=HIDDEN // HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=SEQUENCE,
        normalization=backbone.get("normalization", "RMSNorm"),
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=backbone.get("layernorm_zero_centered_gamma", False),
        activation="silu" if gated else "gelu",
        gated_linear_unit=gated,
        add_bias_linear=backbone.get("add_bias_linear", False),
        add_qkv_bias=backbone.get("add_qkv_bias", False),
        qk_layernorm=backbone.get("qk_layernorm", False),
        rotary_interleaved=backbone.get("rotary_interleaved", False),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=backbone["tied"],
        params_dtype="float32",
    )


def megatron_logits(model, tokens) -> dict[int | str, torch.Tensor]:
    """Logits [s, v] of every exit by position, and of the final head."""
    logits: dict[int | str, torch.Tensor] = {}

    def tap(exits, position, hidden, labels, loss_mask, final_tokens, layer_kwargs, *asked):
        def project(branch, weight):
            return branch[:, 0] @ weight.T

        logits[position] = exits(position, hidden, project, layer_kwargs)
        return hidden

    positions = torch.arange(len(tokens))[None]
    model.exit_tap = tap
    model(tokens[None], positions, None, labels=tokens[None])
    logits["final"] = model(tokens[None], positions, None)[0]
    return logits
