"""Megatron Bridge's description of a model, converted to Megatron's arguments.

Bridge writes the same distributed checkpoints as Megatron, except for the arguments: it describes
the model in `run_config.yaml` beside the weights, with the names of Megatron's transformer config.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FILE = "run_config.yaml"
_MODELS = "megatron.bridge.models."
_KNOWN_MODELS = ("gpt_provider.", "llama.", "mistral.", "qwen.")
"""Modules whose models are completely described by their fields."""

_RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "seq_length": "max_position_embeddings",
}
_NEEDED = (
    *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "params_dtype"),
    *("normalization", "position_embedding_type", "activation_func", "vocab_size"),
)
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_ACTIVATIONS: dict[tuple[str, bool], dict[str, bool]] = {
    ("silu", True): {"swiglu": True},
    ("quick_gelu", True): {"quick_geglu": True},
    ("squared_relu", False): {"squared_relu": True},
    ("gelu", False): {},
}
"""Function and whether the MLP is gated -> Megatron's flags."""


def bridge_args(iteration_dir: Path) -> Namespace | None:
    """The arguments with which Megatron would build the model; None without Bridge's file.

    Args:
        iteration_dir: of the checkpoint.

    Raises:
        ValueError: the file cannot be read, or describes another kind of model than is known.
    """
    path = iteration_dir / _FILE
    if not path.is_file():
        return None
    try:
        return Namespace(**_args(_read(path), iteration_dir))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    # With omegaconf, of which megatron.training is made.
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError("cannot be read as YAML without objects") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise ValueError("has no model section")
    return config


def _args(config: Mapping[str, Any], iteration_dir: Path) -> dict[str, Any]:
    model = dict(config["model"])
    target = str(model.get("_target_"))
    if not target.removeprefix(_MODELS).startswith(_KNOWN_MODELS):
        raise ValueError(
            f"model {target} is not supported, allowed: those of {_MODELS}"
            f"{{{', '.join(name.rstrip('.') for name in _KNOWN_MODELS)}}}"
        )
    # Newer releases keep the fields of Megatron's config apart.
    model |= model.get("transformer") or {}
    missing = next((name for name in _NEEDED if model.get(name) is None), None)
    if missing is not None:
        raise ValueError(f"does not say {missing} of the model")
    args: dict[str, Any] = {_RENAMED.get(str(n), str(n)): value for n, value in model.items()}
    heads, groups = model["num_attention_heads"], model.get("num_query_groups")
    args |= {
        "params_dtype": _dtype(model["params_dtype"]),
        "group_query_attention": groups not in (None, heads),
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights"),
        "bias_gelu_fusion": bool(model.get("bias_activation_fusion")),
        **_activation(model),
        **_rope_scaling(model),
        **_tokenizer(config.get("tokenizer") or {}, iteration_dir),
    }
    return args


def _last_name(value: Any) -> str:
    target = value.get("_target_") if isinstance(value, Mapping) else value
    return str(target).rpartition(".")[2]


def _dtype(value: Any) -> torch.dtype:
    dtype = getattr(torch, _last_name(value), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"params_dtype {_last_name(value)} is not known")
    return dtype


def _activation(model: Mapping[str, Any]) -> dict[str, bool]:
    function, is_gated = _last_name(model["activation_func"]), bool(model.get("gated_linear_unit"))
    flags = _ACTIVATIONS.get((function, is_gated))
    if flags is None:
        gated = "in a gated MLP" if is_gated else "in an MLP without a gate"
        raise ValueError(f"activation_func {function} {gated} is not supported")
    return flags


def _rope_scaling(model: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for Llama 3.1's frequency scaling, whose factor Bridge calls
    `scale_factor`."""
    factor = model.get("scale_factor")
    if factor is None:
        return {}
    for name, value in _LLAMA3_SCALING.items():
        if model.get(name, value) != value:
            raise ValueError(f"{name} {model[name]} is not supported, allowed: {value}")
    return {"use_rope_scaling": True, "rope_scaling_factor": factor}


def _tokenizer(section: Mapping[str, Any], iteration_dir: Path) -> dict[str, Any]:
    found = {name: section.get(name) for name in ("tokenizer_type", "tokenizer_model")}
    beside = iteration_dir / "tokenizer"
    if found["tokenizer_type"] == "HuggingFaceTokenizer" and beside.is_dir():
        found["tokenizer_model"] = str(beside)
    return found
