"""Which tensors of the Llama family are which of ours: one table, read in both directions.

The family's names are those of `transformers`. Exits, which it does not know, keep our names for
where they are and get its names for what they consist of.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.early_exit.checkpoint.huggingface.layouts import (
    CONCAT_ROWS,
    GROUP_BY_GROUP,
    IDENTITY,
    SWAPPED_COLUMNS,
    TensorLayout,
)
from megatron.early_exit.config import HEAD_PARTS


@dataclass(frozen=True, slots=True)
class Origin:
    """What one of our tensors is made of.

    Attributes:
        names: of the family's tensors.
        layout: how they lie in ours.
    """

    names: tuple[str, ...]
    layout: TensorLayout = IDENTITY


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")


_TENSORS: Mapping[str, Origin] = {
    "embedding.word_embeddings.weight": Origin(("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Origin(("model.norm.weight",)),
    "output_layer.weight": Origin(("lm_head.weight",)),
    # Of a layer, also of one in an exit.
    "self_attention.linear_qkv.layer_norm_weight": Origin(("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Origin(_projections("weight"), GROUP_BY_GROUP),
    "self_attention.linear_qkv.bias": Origin(_projections("bias"), GROUP_BY_GROUP),
    "self_attention.q_layernorm.weight": Origin(("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Origin(("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Origin(("self_attn.o_proj.weight",)),
    "self_attention.linear_proj.bias": Origin(("self_attn.o_proj.bias",)),
    # Of a layer, or of an exit with an MLP of its own.
    "mlp.linear_fc1.layer_norm_weight": Origin(("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Origin(("mlp.gate_proj.weight", "mlp.up_proj.weight"), CONCAT_ROWS),
    "mlp.linear_fc1.bias": Origin(("mlp.gate_proj.bias", "mlp.up_proj.bias"), CONCAT_ROWS),
    "mlp.linear_fc2.weight": Origin(("mlp.down_proj.weight",)),
    "mlp.linear_fc2.bias": Origin(("mlp.down_proj.bias",)),
    # Of the multi-token-prediction module, whose layers are like others otherwise. The names are
    # MiMo's, whose projection takes [hidden state, embedding] (MiMoMTPLayers in its
    # modeling_mimo.py, and mimo_mtp.py of vLLM and of SGLang); Megatron's takes them the other way
    # round. Its hidden state is the one behind the final norm in SGLang, as in Megatron (and so
    # Megatron Bridge's mimo_bridge.py converts it), and the one in front of it in vLLM's mimo.py.
    "enorm.weight": Origin(("token_layernorm.weight",)),
    "hnorm.weight": Origin(("hidden_layernorm.weight",)),
    "eh_proj.weight": Origin(("input_proj.weight",), SWAPPED_COLUMNS),
    "final_layernorm.weight": Origin(("final_layernorm.weight",)),
    # Of an exit.
    "norm.weight": Origin(("norm.weight",)),
    "projection.weight": Origin(("projection.weight",)),
    **{
        f"{part.module}.{name}": Origin((f"{part.module}.{name}",))
        for part in HEAD_PARTS
        if not (isinstance(part.tensors, str) or part.is_beside)
        for name in part.tensors
    },
}

_PLACES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"decoder\.layers\.(\d+)\."), "model.layers.{}."),
    (re.compile(r"mtp\.layers\.(\d+)\.(?:transformer_layer\.)?"), "model.mtp_layers.{}."),
    (re.compile(r"exits\.(\d+)\.block\."), "exits.{}.block."),
    (re.compile(r"exits\.(\d+)\."), "exits.{}."),
)
"""What our names of a part of the model start with, and what the family's do."""

BUFFER = re.compile(r"(model\.(mtp_)?layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""What old files hold besides weights: it follows from the configuration."""


def origin(name: str) -> Origin:
    """What our tensor `name` is made of.

    Raises:
        ValueError: the Llama family has nothing of the kind.
    """
    prefix, rest = "", name
    for ours, theirs in _PLACES:
        found = ours.match(name)
        if found is not None:
            prefix, rest = theirs.format(found[1]), name[found.end() :]
            break
    if rest not in _TENSORS:
        raise ValueError(f"{name} has no counterpart in Hugging Face's Llama family")
    known = _TENSORS[rest]
    return Origin(tuple(f"{prefix}{one}" for one in known.names), known.layout)
