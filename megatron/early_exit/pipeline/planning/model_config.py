"""The shape of a model from a config.json of Hugging Face's Llama family."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Contexts grow beyond what models are trained with.
_LONGEST_DEFAULT = 4096


def read_model_config(path: Path) -> dict[str, int | bool]:
    """The fields of a `ModelShape` that a config.json tells.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        ValueError: there is no such file, it is of another kind of model, or lacks something.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"--config {path} is no config.json of a model, allowed: a JSON object")
    for name in _EXPERTS:
        if config.get(name):
            raise ValueError(f"--config {path}: {name} {config[name]}, allowed: dense models")
    shape: dict[str, int | bool] = {
        field: _number(config, name, path) for field, name in _NAMES.items()
    }
    heads = shape["num_attention_heads"]
    shape["num_query_groups"] = (
        _number(config, "num_key_value_heads", path) if "num_key_value_heads" in config else heads
    )
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * heads != shape["hidden_size"]:
        raise ValueError(
            f"--config {path}: head_dim {head_dim}, allowed: hidden_size / num_attention_heads, "
            f"{shape['hidden_size'] / heads:g}"
        )
    shape["seq_length"] = min(_number(config, "max_position_embeddings", path), _LONGEST_DEFAULT)
    shape["tied_embedding"] = bool(config.get("tie_word_embeddings", False))
    return shape


def _number(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"--config {path}: {name} {value!r} is out of range, allowed: 1 or more")
    return value
