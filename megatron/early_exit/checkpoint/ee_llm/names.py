"""EE-LLM's names of the tensors of a model, and how its tensor-parallel ranks divide the tensors.

In EE-LLM (arXiv 2312.04916) layer N, counted from 0, contains the modules of the exit of
`--exit-layer-nums` N + 1, whether the exit is before or after the layer: `exit_norm`, `exit_block`,
and if exits have an MLP two MLPs, `mlp.trunk` for the backbone and `mlp.branch` for the exit, after
one norm. EE-LLM numbers the projections of exits from 0 on each pipeline stage; here they have the
number of their exit layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.weights import LAYERS
from megatron.early_exit.config import EarlyExitConfig

Join = Callable[[Sequence[Tensor]], Tensor]
"""Puts the parts of the tensor-parallel ranks together."""

EXIT_PROJECTION = "exit_output_layer."
ENCODER_LAYERS = "encoder.layers."

_IN_LAYER = (
    ("self_attention.linear_qkv.layer_norm_", "input_norm."),
    ("self_attention.linear_qkv.", "self_attention.query_key_value."),
    ("self_attention.linear_proj.", "self_attention.dense."),
    ("mlp.linear_fc1.layer_norm_", "post_attention_norm."),
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h."),
    ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
)
"""Prefixes of the names of a layer's tensors, here and in EE-LLM; the first that matches counts."""


def ee_llm_name(name: str, early_exit: EarlyExitConfig) -> str:
    """EE-LLM's name of a tensor of `weight_shapes`, in a model with these exits."""
    # Both ascend.
    number_of = dict(zip(early_exit.positions, sorted(early_exit.exit_layer_nums), strict=True))
    if name.startswith(LAYERS):
        layer, _, rest = name.removeprefix(LAYERS).partition(".")
        inside = _name_in_layer(rest)
        if early_exit.use_exit_mlp and int(layer) + 1 in number_of.values():
            inside = inside.replace("mlp.", "mlp.trunk.")
        return f"{ENCODER_LAYERS}{layer}.{inside}"
    if name.startswith("decoder.final_layernorm."):
        return name.replace("decoder.final_layernorm.", "encoder.final_norm.")
    if not name.startswith("exits."):
        return name
    _, position, part, rest = name.split(".", 3)
    number = number_of[int(position)]
    layer = f"{ENCODER_LAYERS}{number - 1}."
    if part == "projection":
        return f"{EXIT_PROJECTION}{number}.{rest}"
    if part == "norm":
        return f"{layer}exit_norm.{rest}"
    if part == "mlp":
        return layer + _name_in_layer(f"mlp.{rest}").replace("mlp.", "mlp.branch.")
    return f"{layer}exit_block.{_name_in_layer(rest)}"


def _name_in_layer(rest: str) -> str:
    here, there = next(pair for pair in _IN_LAYER if rest.startswith(pair[0]))
    return there + rest.removeprefix(here)


def join_of(name: str, gated: bool) -> Join:
    """How the parts of a tensor become the whole.

    Args:
        name: one of EE-LLM's.
        gated: MLPs are gated; each rank then has its part of the gate above its part of what it
            gates.
    """
    if name.endswith((".dense.weight", "dense_4h_to_h.weight")):
        return lambda parts: torch.cat(list(parts), dim=1)
    if "dense_h_to_4h." in name and gated:
        return _join_gated
    rows = ("query_key_value.", "dense_h_to_4h.", "word_embeddings.", "output_layer.")
    if any(part in name for part in rows):
        return lambda parts: torch.cat(list(parts))
    return lambda parts: parts[0]


def _join_gated(parts: Sequence[Tensor]) -> Tensor:
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[i] for i in (0, 1) for half in halves])
