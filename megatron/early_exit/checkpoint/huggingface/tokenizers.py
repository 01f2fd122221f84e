"""The tokenizer beside a model's weights, and the special tokens that its configuration names."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.huggingface.shards import read_json
from megatron.early_exit.checkpoint.tokenizer import HUGGINGFACE_TYPE, TokenizerDescription

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerDescription | None:
    """Describe the tokenizer in a folder; None where it holds none.

    Args:
        folder: of the model.
        config: what its config.json holds.

    Raises:
        ValueError: its generation_config.json is damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    generation: Mapping[str, Any] = {}
    if (folder / GENERATION_NAME).is_file():
        generation = read_json(folder / GENERATION_NAME)
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    if isinstance(ends, list):
        # Of several the tokenizer knows which one ends a text.
        ends = ends[0] if len(ends) == 1 else None
    return TokenizerDescription(type=HUGGINGFACE_TYPE, model=str(folder.resolve()), eod_id=ends)


def special_tokens(folder: Path | None, eod_id: int | None) -> dict[str, Any]:
    """The ids of special tokens for a config.json: as in the one beside the tokenizer, which an
    imported model has kept, else the end of a document alone.

    Args:
        folder: with the tokenizer's files, if there is one.
        eod_id: the token that ends a document.

    Raises:
        ValueError: the config.json beside the tokenizer is damaged.
    """
    kept: Mapping[str, Any] = {"eos_token_id": eod_id}
    if folder is not None and (folder / CONFIG_NAME).is_file():
        kept = read_json(folder / CONFIG_NAME)
    return {name: kept.get(name) for name in SPECIAL_TOKENS}


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy a tokenizer's files, and the settings for generation, beside a model.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"tokenizer {folder}: there is no such folder")
    for file in folder.iterdir():
        if file.is_file() and file.name != CONFIG_NAME:
            shutil.copyfile(file, target / file.name)
