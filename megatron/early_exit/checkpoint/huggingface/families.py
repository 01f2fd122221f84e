"""The models of Hugging Face's Llama family: their `config.json` and our `Architecture`.

MiMo (arXiv 2505.07608) is the one with a multi-token-prediction module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.huggingface.rotary_settings import (
    positive_number,
    read_rotary,
    write_rotary,
)
from megatron.early_exit.checkpoint.huggingface_config import count, read_sizes
from megatron.early_exit.errors import out_of_range


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one class of transformers computes.

    Attributes:
        name: of the class, as in `architectures`.
        model_type: its short name.
        qkv_bias: the projections to queries, keys and values have a bias.
        qk_norm: queries and keys are normalised.
        head_size: size of a head where config.json does not tell; None is h / heads.
        has_mtp: may have a layer that predicts a second token, Megatron's multi-token prediction.
    """

    name: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_size: int | None = None
    has_mtp: bool = False


LLAMA = Family("LlamaForCausalLM", "llama")
MISTRAL = Family("MistralForCausalLM", "mistral")
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, head_size=128)
MIMO = Family("MiMoForCausalLM", "mimo", qkv_bias=True, has_mtp=True)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, MIMO)

_MTP_LAYERS = "num_nextn_predict_layers"


def read_architecture(config: Mapping[str, Any], stored: torch.dtype) -> Architecture:
    """The backbone that a config.json describes.

    Args:
        config: what it holds.
        stored: dtype of the weights, for a config.json that tells none.

    Raises:
        ValueError: it is of another family, something is missing, or asks for what Megatron or
            inference cannot compute.
    """
    family = _family(config)
    _refuse_unsupported(config, family)
    # transformers' class gives these models' linear layers no other biases, whatever is asked for.
    has_biases = False if family.qkv_bias else _has_biases(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or stored
    return Architecture(
        **read_sizes(config, family.head_size),
        normalization="RMSNorm",
        layernorm_epsilon=positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        activation="silu",
        gated_linear_unit=True,
        add_bias_linear=has_biases,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        position_embedding_type="rope",
        **read_rotary(config),
        mtp_num_layers=_mtp_layers(config) if family.has_mtp else 0,
        params_dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )


def _family(config: Mapping[str, Any]) -> Family:
    names = config.get("architectures") or [config.get("model_type")]
    for family in FAMILIES:
        if names[0] in (family.name, family.model_type):
            return family
    allowed = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"architecture {names[0]} is not supported, allowed: {allowed}")


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported, allowed: silu")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        if isinstance(method, Mapping):
            method = method.get("quant_method")
        raise ValueError(
            f"quantization_config {method} is not supported, allowed: weights as they are"
        )
    kinds = set(config.get("layer_types") or ())
    # Before there were types of layers, a window in a Mistral was one, and in a Qwen maybe.
    is_windowed = bool(config.get("use_sliding_window", family is MISTRAL))
    if kinds:
        is_windowed = kinds != {"full_attention"}
    if not is_windowed:
        return
    context = count(config, "max_position_embeddings")
    window = count(config, "sliding_window", context)
    if window < context:
        raise ValueError(
            f"sliding_window {window} is not supported, allowed: null, or max_position_embeddings "
            f"{context} or more"
        )


def _has_biases(config: Mapping[str, Any]) -> bool:
    attention, mlp = (bool(config.get(f"{part}_bias", False)) for part in ("attention", "mlp"))
    if attention != mlp:
        raise ValueError(
            f"attention_bias {attention} with mlp_bias {mlp} is not supported, allowed: both or "
            "neither"
        )
    return attention


def _mtp_layers(config: Mapping[str, Any]) -> int:
    """Layers that predict further tokens. How several of them follow one another neither MiMo's own
    class nor vLLM's defines."""
    value = config.get(_MTP_LAYERS) or 0
    if value not in (0, 1):
        raise out_of_range(_MTP_LAYERS, value, "0 or 1")
    return int(value)


def write_config(a: Architecture, with_mtp: bool = False) -> dict[str, Any]:
    """A config.json for the class that computes a backbone.

    Args:
        a: the model.
        with_mtp: of the class that computes its multi-token-prediction module, too, which
            transformers does not have.

    Raises:
        ValueError: none in the Llama family does; the message says what is in the way.
    """
    family = _find_family(a)
    if with_mtp:
        _check_mtp(a, family)
        family = MIMO
    config: dict[str, Any] = {
        "architectures": [family.name],
        "model_type": family.model_type,
        **write_sizes(a),
        **write_rotary(a),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    if family in (LLAMA, QWEN3):
        config["attention_bias"] = a.add_bias_linear
    if family is LLAMA:
        config["mlp_bias"] = a.add_bias_linear
    if family is not LLAMA:
        config["sliding_window"] = None
    if family in (QWEN2, QWEN3, MIMO):
        config["use_sliding_window"] = False
    if family is MIMO:
        config[_MTP_LAYERS] = a.mtp_num_layers
        # The files are MiMo's own, and not in the folder.
        config["auto_map"] = {
            "AutoConfig": "configuration_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        }
    return config


def _check_mtp(a: Architecture, family: Family) -> None:
    if a.mtp_num_layers != 1:
        raise ValueError(
            f"a module with mtp_num_layers {a.mtp_num_layers} cannot be expressed in MiMo's "
            "format, allowed: 1"
        )
    if family is not QWEN2:
        raise ValueError(
            f"the module of a model like {family.name} cannot be expressed in MiMo's format, "
            f"allowed: models like {QWEN2.name}"
        )


def write_sizes(a: Architecture) -> dict[str, Any]:
    """The entries of a config.json that all of the family have."""
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.layernorm_epsilon,
        "tie_word_embeddings": a.share_embeddings_and_output_weights,
        # Under its older name every version of transformers finds it.
        "torch_dtype": a.params_dtype,
        "use_cache": True,
    }


def _find_family(a: Architecture) -> Family:
    refuse_inexpressible(a)
    if a.add_bias_linear and (a.add_qkv_bias or a.qk_layernorm):
        raise ValueError(
            "biases of all linear layers with --add-qkv-bias or --qk-layernorm cannot be expressed "
            "in Hugging Face's Llama family"
        )
    if a.add_qkv_bias and a.qk_layernorm:
        raise ValueError(
            "--add-qkv-bias with --qk-layernorm cannot be expressed in Hugging Face's Llama "
            "family, allowed: one of the two"
        )
    if a.qk_layernorm:
        return QWEN3
    if a.add_qkv_bias:
        return QWEN2
    # transformers insists on whole heads of a Llama, though they have a size of their own.
    if a.hidden_size % a.num_attention_heads and not a.add_bias_linear:
        return MISTRAL
    return LLAMA


def refuse_inexpressible(a: Architecture) -> None:
    """Refuse features that no model of the Llama family has.

    Raises:
        ValueError: the backbone has such a feature.
    """
    for name, allowed in _EXPRESSIBLE.items():
        if (value := getattr(a, name)) != allowed:
            raise ValueError(
                f"{name} {value} cannot be expressed in Hugging Face's Llama family, allowed: "
                f"{allowed}"
            )


_EXPRESSIBLE: dict[str, object] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "activation": "silu",
    "gated_linear_unit": True,
    "softmax_scale": None,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
}
"""What all models of the Llama family have in common."""
