"""The tokens that end a text, according to the files beside a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"


def as_end_tokens(value: object) -> tuple[int, ...]:
    """The tokens of an `eos_token_id`, which is one or a list of them."""
    values = value if isinstance(value, list) else [value]
    is_token = [isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values]
    return tuple(dict.fromkeys(one for one, fits in zip(values, is_token, strict=True) if fits))


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """All tokens that end a text; those of generation_config.json come first.

    Args:
        config: what config.json holds.
        generation: what generation_config.json holds.
    """
    named = [as_end_tokens(one.get("eos_token_id")) for one in (generation, config)]
    return tuple(dict.fromkeys(token for one in named for token in one))


def end_tokens_in(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text according to the files in a folder; none if there are no such
    files.

    Raises:
        ValueError: a file is damaged.
    """
    return end_tokens(_read(folder / CONFIG_NAME), _read(folder / GENERATION_NAME))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return values
