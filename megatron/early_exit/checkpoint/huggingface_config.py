"""What the JSON files beside a model of Hugging Face's say, whichever family it is of: its sizes,
and the tokens that end a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.text_files import read_json
from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import INDEX, ONE_OR_MORE

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


def read_sizes(config: Mapping[str, Any], head_size: int | None = None) -> dict[str, Any]:
    """The fields of an `Architecture` that are sizes, and whether it shares its embedding.

    Args:
        config: what config.json holds.
        head_size: size of a head if config.json does not say; None is h / heads.

    Raises:
        ValueError: one is missing, or out of range.
    """
    sizes = {field: count(config, name) for field, name in _NAMES.items()}
    hidden_size, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    return {
        **sizes,
        "num_query_groups": count(config, "num_key_value_heads", heads),
        "kv_channels": count(config, "head_dim", head_size or max(hidden_size // heads, 1)),
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
    }


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An entry of a config.json that counts something, or `default` if it is missing or null.

    Raises:
        ValueError: it is no whole number from 1 on.
    """
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or value not in ONE_OR_MORE:
        raise out_of_range(name, value, str(ONE_OR_MORE))
    return value


def as_end_tokens(value: object) -> tuple[int, ...]:
    """The tokens of an `eos_token_id`, which is one or a list of them."""
    values: list[Any] = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(one for one in values if one in INDEX))


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, by what config.json and generation_config.json hold; those of the
    latter come first."""
    named = [as_end_tokens(one.get("eos_token_id")) for one in (generation, config)]
    return tuple(dict.fromkeys(token for one in named for token in one))


def end_tokens_in(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text by the files in a folder; none where there are no such files.

    Raises:
        ValueError: a file is damaged.
    """
    files = (folder / CONFIG_NAME, folder / GENERATION_NAME)
    return end_tokens(*(read_json(file) if file.is_file() else {} for file in files))
