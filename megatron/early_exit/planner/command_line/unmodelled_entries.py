"""Entries of a config.json of Hugging Face's that the planner refuses by name."""

from collections.abc import Mapping
from typing import Any

_WINDOW = "attention in a window"
_MIXED = "a mixture of different layers"
_EXPERTS = "a mixture of experts of this kind"
_STATES = "a state in place of attention"
# What is not modelled unless it is missing, null, false, empty or 0.
_REFUSED = {
    "kv_lora_rank": "multi-latent attention",
    "q_lora_rank": "multi-latent attention",
    "is_encoder_decoder": "an encoder",
    "moe_num_experts": _EXPERTS,
    "moe_k": _EXPERTS,
    "moe_topk": _EXPERTS,
    "ffn_config": _EXPERTS,
    "zero_expert_num": _EXPERTS,
    "layers_block_type": _MIXED,
    "hybrid_override_pattern": _MIXED,
    "block_types": _MIXED,
    "attn_type_list": _MIXED,
    "attn_layer_indices": _MIXED,
    "attention_chunk_size": _WINDOW,
    "num_kv_shared_layers": "sharing keys and values among layers",
}
# What is not modelled unless it is the same for each layer.
_PERIODS = (
    *("attn_layer_period", "expert_layer_period", "moe_layer_interval"),
    "full_attention_interval",
)
# Of a mixture of experts: the layers that have none, as a list or number of them, or as a period.
_LAYERS_WITHOUT_EXPERTS = {
    "first_k_dense_replace": (0,),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "interleave_moe_layer_step": (1,),
    "moe_layer_freq": (1,),
}
_STATE_PREFIXES = ("mamba_", "ssm_", "linear_num_", "rwkv_")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def refuse_unmodelled_entries(config: Mapping[str, Any], seq_length: int) -> None:
    """Refuse a model whose layers are not all alike, or not such that the planner knows them.

    Args:
        config: what config.json holds.
        seq_length: tokens of a sequence: a window that is no shorter changes nothing.

    Raises:
        ValueError: naming the first such entry.
    """
    for name, value in config.items():
        what = _REFUSED.get(name)
        if name in _PERIODS and value != 1:
            what = _MIXED
        if name.startswith(_STATE_PREFIXES):
            what = _STATES
        if what is not None and value:
            raise ValueError(f"{name} {value}: {what} is not modelled")
    has_window = config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    is_windowed = bool(has_window) and isinstance(window, int) and window < seq_length
    if is_windowed:
        raise ValueError(
            f"sliding_window {window}: {_WINDOW} is not modelled, allowed: --seq-length up to it"
        )
    types = config.get("layer_types") or []
    for one in types:
        if one not in (_FULL, _SLIDING) or (one == _SLIDING and window is None):
            raise ValueError(f"layer_types with {one}: {_MIXED} is not modelled")


def refuse_layers_without_experts(config: Mapping[str, Any]) -> None:
    """Refuse a mixture of experts some of whose layers have an MLP.

    Args:
        config: what config.json holds.

    Raises:
        ValueError: naming the first entry that says so.
    """
    for name, allowed in _LAYERS_WITHOUT_EXPERTS.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} {value}: {_MIXED} is not modelled")
