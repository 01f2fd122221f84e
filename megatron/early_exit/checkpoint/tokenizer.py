"""Text to tokens and back, as training saw it, without Megatron.

The libraries are Megatron's own (SentencePiece, transformers) with the settings that its flags
give them, so a text gets the very ids that it got in the training data.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron.early_exit.checkpoint.huggingface_config import end_tokens_in
from megatron.early_exit.checkpoint.huggingface_text import HuggingFaceText
from megatron.early_exit.checkpoint.sentencepiece_text import SentencePieceText

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
HUGGINGFACE_TYPE = "HuggingFaceTokenizer"
_HUGGINGFACE_FILES = (
    *("added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json"),
    *("merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
)


class Tokenizer(Protocol):
    """The methods of a tokenizer that inference uses."""

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are."""

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document."""

    @property
    def other_end_ids(self) -> tuple[int, ...]:
        """Further tokens that end a text: of the turn of a conversation, say."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, where there is one."""

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of `bos_token`, `eos_token` and `pad_token`."""

    @property
    def chat_template(self) -> str | None:
        """How conversations become texts, in Jinja; None where the model knows none."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: what it says.
            add_special_tokens: frame it as the texts of the training data were framed.
        """

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model is to answer.

        Args:
            messages: `role` and `content` of each.

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens; bytes that are not a complete character become U+FFFD.

        The text of the first tokens is the beginning of the text of all tokens, except for its last
        character if that is unfinished.
        """

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that may be a part of a character, or come between such parts.

        Returns:
            Its bytes; empty for a token that `decode` skips. None for a token of whole characters,
            after which an unfinished character before it can no longer be completed.
        """

    def unfinished_length(self, data: bytes) -> int:
        """How many characters U+FFFD `decode` gives for an unfinished character at the end, by its
        first 1 to 3 bytes."""

    def token_name(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary; None if the vocabulary lacks it."""


@dataclass(frozen=True, slots=True)
class TokenizerDescription:
    """Which tokenizer a model was trained with."""

    type: str
    """A value of `--tokenizer-type`."""
    model: str | None
    """`--tokenizer-model`: a path, relative to the folder with the tokenizer's files; for
    HuggingFaceTokenizer a folder or a name on the hub."""
    eod_id: int | None = None
    """The token that ends a document; None leaves it to the tokenizer."""
    keeps_extra_spaces: bool = False
    """SentencePiece: `--no-tokenizer-sentencepiece-ignore-extra-whitespaces` was given."""
    legacy: bool = False
    """SentencePiece: `--tokenizer-sentencepiece-legacy` was given."""
    adds_special_tokens: bool = True
    """HuggingFace: prompts get the special tokens that the tokenizer frames texts with."""
    other_end_ids: tuple[int, ...] = ()
    """Further tokens that end a text."""
    num_extra_ids: int = 0
    """SentencePiece: `--vocab-extra-ids`, which count with `legacy`."""

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "other_end_ids", tuple(self.other_end_ids))

    @classmethod
    def from_args(cls, args: object, eod_id: int | None = None) -> "TokenizerDescription | None":
        """Read the tokenizer from Megatron's arguments; None where they name none."""
        kind = getattr(args, "tokenizer_type", None)
        if kind is None:
            return None
        if eod_id is None and kind == "NullTokenizer":
            eod_id = getattr(args, "null_tokenizer_eod_id", None)
        model = getattr(args, "tokenizer_model", None)
        ends: tuple[int, ...] = ()
        if kind == HUGGINGFACE_TYPE and model is not None and Path(model).is_dir():
            ends = end_tokens_in(Path(model))
        return cls(
            type=kind,
            model=model,
            eod_id=eod_id,
            keeps_extra_spaces=not getattr(
                args, "tokenizer_sentencepiece_ignore_extra_whitespaces", True
            ),
            legacy=bool(getattr(args, "tokenizer_sentencepiece_legacy", False)),
            adds_special_tokens=not getattr(args, "tokenizer_hf_no_include_special_tokens", False),
            other_end_ids=tuple(one for one in ends if one != eod_id),
            num_extra_ids=getattr(args, "vocab_extra_ids", 0) or 0,
        )


def load_tokenizer(description: TokenizerDescription, folder: Path) -> Tokenizer | None:
    """Load a tokenizer; None if its type has no text or is not supported by inference.

    Args:
        description: which tokenizer.
        folder: the folder to which its paths are relative.

    Raises:
        ValueError: its files are missing or damaged, or it is set up in a way that is not
            supported.
    """
    if description.type not in (*SENTENCEPIECE_TYPES, HUGGINGFACE_TYPE):
        return None
    if description.model is None:
        raise ValueError(f"the model's {description.type} names no --tokenizer-model")
    path = folder / description.model
    if not path.exists():
        raise ValueError(f"tokenizer {path}: there is no such file or folder")
    if description.type == HUGGINGFACE_TYPE:
        return HuggingFaceText(
            path,
            description.eod_id,
            description.adds_special_tokens,
            # Models that were imported before descriptions had them have the files.
            (*description.other_end_ids, *end_tokens_in(path)),
        )
    tokenizer = SentencePieceText(
        path, description.eod_id, description.legacy, description.num_extra_ids
    )
    if description.keeps_extra_spaces and tokenizer.drops_extra_spaces():
        raise ValueError(
            "--no-tokenizer-sentencepiece-ignore-extra-whitespaces is not supported by inference "
            "with a SentencePiece model that itself drops extra spaces"
        )
    return tokenizer


def install_tokenizer(description: TokenizerDescription, folder: Path) -> TokenizerDescription:
    """Copy a tokenizer's files into `folder`, atomically; returns the description of the copy.

    A folder that holds the same files already is left alone.

    Raises:
        ValueError: there are no such files.
    """
    if description.model is None:
        return description
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model = _copy(description, partial)
        if not _same_files(partial, folder):
            _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(description, model=model)


def _copy(description: TokenizerDescription, target: Path) -> str:
    """Copy the files into `target` and return the model's path relative to it."""
    assert description.model is not None
    source = Path(description.model)
    if source.is_dir():
        for file in source.iterdir():
            if file.name in _HUGGINGFACE_FILES:
                shutil.copyfile(file, target / file.name)
        return "."
    if source.is_file():
        shutil.copyfile(source, target / source.name)
        return source.name
    if description.type == HUGGINGFACE_TYPE:
        from transformers import AutoTokenizer

        # A name on the hub: training has loaded it a moment ago, so it is in the local cache.
        tokenizer: Any = AutoTokenizer.from_pretrained(description.model)
        tokenizer.save_pretrained(str(target))
        return "."
    raise ValueError(f"--tokenizer-model {description.model}: there is no such file")


def _same_files(left: Path, right: Path) -> bool:
    if not right.is_dir():
        return False
    names = {file.name for file in left.iterdir()}
    if names != {file.name for file in right.iterdir()}:
        return False
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)
