"""The tokenizer beside a model's weights, and the special tokens that its configuration names."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.huggingface.sentencepiece_tokenizer import (
    convert_sentencepiece,
)
from megatron.early_exit.checkpoint.huggingface_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    as_end_tokens,
    end_tokens,
)
from megatron.early_exit.checkpoint.text_files import read_json
from megatron.early_exit.checkpoint.tokenizer import (
    HUGGINGFACE_TYPE,
    SENTENCEPIECE_TYPES,
    TokenizerDescription,
)

_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
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
    first = generation if generation.get("eos_token_id") is not None else config
    mains = as_end_tokens(first.get("eos_token_id"))
    # Of several the tokenizer knows which one ends a document.
    main = mains[0] if len(mains) == 1 else None
    others = tuple(one for one in end_tokens(config, generation) if one != main)
    model = str(folder.resolve())
    return TokenizerDescription(HUGGINGFACE_TYPE, model, main, other_end_ids=others)


@dataclass(frozen=True, slots=True)
class TokenizerExport:
    """A tokenizer on its way into a folder.

    Attributes:
        special_tokens: their ids, for a config.json.
        install: puts its files into a folder; None where transformers has none that gives the same
            tokens.
    """

    special_tokens: Mapping[str, Any]
    install: Callable[[Path], object] | None


def export_tokenizer(tokenizer: TokenizerDescription | None) -> TokenizerExport:
    """The tokenizer of a model of ours, for transformers.

    Raises:
        ValueError: its files are missing or damaged.
    """
    ids: dict[str, Any] = dict.fromkeys(SPECIAL_TOKENS)
    if tokenizer is None:
        return TokenizerExport(ids, None)
    ids["eos_token_id"] = _all_ends(tokenizer, tokenizer.eod_id)
    if tokenizer.model is None or tokenizer.legacy:
        return TokenizerExport(ids, None)
    path = Path(tokenizer.model)
    if tokenizer.type == HUGGINGFACE_TYPE:
        if not path.is_dir():
            raise ValueError(f"tokenizer {path}: there is no such folder")
        if (path / CONFIG_NAME).is_file():
            # Of an imported model: what it said of them then.
            kept = read_json(path / CONFIG_NAME)
            ids = {name: kept.get(name) for name in SPECIAL_TOKENS}
            ids["eos_token_id"] = _all_ends(tokenizer, ids["eos_token_id"])
        return TokenizerExport(ids, partial(_copy, path))
    converted = None
    if tokenizer.type in SENTENCEPIECE_TYPES:
        converted = convert_sentencepiece(path)
    if converted is None:
        return TokenizerExport(ids, None)
    if tokenizer.eod_id is not None:
        converted.eos_token = converted.convert_ids_to_tokens(tokenizer.eod_id)
    ids = {name: getattr(converted, name) for name in SPECIAL_TOKENS}
    ids["eos_token_id"] = _all_ends(tokenizer, ids["eos_token_id"])
    return TokenizerExport(ids, lambda target: converted.save_pretrained(str(target)))


def _all_ends(tokenizer: TokenizerDescription, known: object) -> int | list[int] | None:
    """What is to stand under `eos_token_id`: one token, a list of several, or nothing."""
    main = () if tokenizer.eod_id is None else (tokenizer.eod_id,)
    ends = list(dict.fromkeys((*as_end_tokens(known), *main, *tokenizer.other_end_ids)))
    return ends if len(ends) > 1 else next(iter(ends), None)


def _copy(folder: Path, target: Path) -> None:
    """A tokenizer's files, and the settings for generation."""
    for file in folder.iterdir():
        if file.is_file() and file.name != CONFIG_NAME:
            shutil.copyfile(file, target / file.name)
