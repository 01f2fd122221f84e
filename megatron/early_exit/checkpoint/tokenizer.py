"""Text to tokens and back, as training saw it, without Megatron.

The libraries are Megatron's own (SentencePiece, transformers) with the settings that its flags
give them, so a text gets the very ids that it got in the training data.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
HUGGINGFACE_TYPE = "HuggingFaceTokenizer"
_HUGGINGFACE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Tokenizer(Protocol):
    """What inference asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, where there is one."""
        ...

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of `bos_token`, `eos_token` and `pad_token`."""
        ...

    @property
    def chat_template(self) -> str | None:
        """How conversations become texts, in Jinja; None where the model knows none."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: what it says.
            add_special_tokens: frame it as the texts of the training data were framed.
        """
        ...

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model is to answer.

        Args:
            messages: `role` and `content` of each.

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens; bytes that are no complete character become U+FFFD."""
        ...


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

    @classmethod
    def from_args(cls, args: object, eod_id: int | None = None) -> "TokenizerDescription | None":
        """Read the tokenizer from Megatron's arguments; None where they name none."""
        kind = getattr(args, "tokenizer_type", None)
        if kind is None:
            return None
        if eod_id is None and kind == "NullTokenizer":
            eod_id = getattr(args, "null_tokenizer_eod_id", None)
        return cls(
            type=kind,
            model=getattr(args, "tokenizer_model", None),
            eod_id=eod_id,
            keeps_extra_spaces=not getattr(
                args, "tokenizer_sentencepiece_ignore_extra_whitespaces", True
            ),
            legacy=bool(getattr(args, "tokenizer_sentencepiece_legacy", False)),
            adds_special_tokens=not getattr(args, "tokenizer_hf_no_include_special_tokens", False),
        )


class _SentencePieceTokenizer:
    def __init__(self, path: Path, eod_id: int | None) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer {path}: is not a SentencePiece model") from error
        begin, end = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = None if begin < 0 else begin
        self.eod_id = eod_id if eod_id is not None or end < 0 else end
        self.chat_template = None
        self.vocab_size: int = self._processor.get_piece_size()

    def drops_extra_spaces(self) -> bool:
        """The model itself folds runs of spaces."""
        return bool(self.encode("x  y") == self.encode("x y"))

    @property
    def special_tokens(self) -> dict[str, str | None]:
        own = self._processor
        ids = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
        return {name: None if one < 0 else own.id_to_piece(one) for name, one in ids.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # Megatron frames texts with no tokens of SentencePiece's.
        return list(self._processor.encode(text))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        raise ValueError("a SentencePiece tokenizer has no chat template")

    def decode(self, token_ids: list[int]) -> str:
        # Megatron may have given a model more tokens than its SentencePiece file has pieces.
        pieces = [token for token in token_ids if token < self.vocab_size]
        return str(self._processor.decode(pieces))


class _HuggingFaceTokenizer:
    def __init__(self, path: Path, eod_id: int | None, adds_special_tokens: bool) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"tokenizer {path}: {HUGGINGFACE_TYPE} needs the transformers package"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"tokenizer {path}: {error}") from error
        self._adds_special_tokens = adds_special_tokens
        self.eod_id: int | None = self._tokenizer.eos_token_id if eod_id is None else eod_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        template = self._tokenizer.chat_template
        # There may be several under names of their own.
        is_named = isinstance(template, dict)
        self.chat_template: str | None = template.get("default") if is_named else template
        self.vocab_size = len(self._tokenizer)

    @property
    def special_tokens(self) -> dict[str, str | None]:
        names = ("bos_token", "eos_token", "pad_token")
        return {name: getattr(self._tokenizer, name) for name in names}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        framed = add_special_tokens and self._adds_special_tokens
        return list(self._tokenizer(text, add_special_tokens=framed).input_ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            # Templates are programs of the model's makers, and may raise anything.
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def load_tokenizer(description: TokenizerDescription, folder: Path) -> Tokenizer | None:
    """Load a tokenizer, or None where its kind has no text or is not supported by inference.

    Args:
        description: which tokenizer.
        folder: what its relative paths are relative to.

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
        return _HuggingFaceTokenizer(path, description.eod_id, description.adds_special_tokens)
    if description.legacy:
        raise ValueError("--tokenizer-sentencepiece-legacy is not supported by inference")
    tokenizer = _SentencePieceTokenizer(path, description.eod_id)
    if description.keeps_extra_spaces and tokenizer.drops_extra_spaces():
        raise ValueError(
            "--no-tokenizer-sentencepiece-ignore-extra-whitespaces is not supported by inference "
            "with a SentencePiece model that itself drops extra spaces"
        )
    return tokenizer


def install_tokenizer(description: TokenizerDescription, folder: Path) -> TokenizerDescription:
    """Copy a tokenizer's files into `folder`, atomically, and describe it from there.

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
    return TokenizerDescription(
        type=description.type,
        model=model,
        eod_id=description.eod_id,
        keeps_extra_spaces=description.keeps_extra_spaces,
        legacy=description.legacy,
        adds_special_tokens=description.adds_special_tokens,
    )


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
