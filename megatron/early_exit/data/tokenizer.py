"""Megatron's own text tokenizers, built from Megatron's own flags: they give the same token ids as
training and inference with the same `--tokenizer-*` flags."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Protocol, cast

from megatron.core.tokenizers.utils.build_tokenizer import (
    MEGATRON_TOKENIZERS,
    SP_TOKENIZERS,
    build_tokenizer,
)
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.config import TokenizerConfig

from megatron.early_exit.errors import one_line
from megatron.early_exit.legacy_tokens import legacy_special_tokens

MODEL_FILE_TOKENIZERS = (*SP_TOKENIZERS, "HuggingFaceTokenizer", "TikTokenizer")
# Their vocabulary is as large as --vocab-size says; every other one brings its size along.
SIZED_BY_FLAG = ("TikTokenizer", "NullTokenizer")
TEXT_TOKENIZERS = (*MODEL_FILE_TOKENIZERS, *MEGATRON_TOKENIZERS, "NullTokenizer")

# They speak of the model or of chats, and have no say in how a text becomes ids.
NOT_FOR_TEXT = ["padded_vocab_size", "pad_vocab_size", "chat_template"]


class TextTokenizer(Protocol):
    """The methods of a tokenizer that indexing uses."""

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are."""

    @property
    def eod(self) -> int | None:
        """The token that ends a document, where there is one."""

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text."""


def add_tokenizer_arguments(parser: ArgumentParser) -> None:
    """Add the flags with which Megatron's training chooses its tokenizer."""
    group = ArgumentGroupFactory(TokenizerConfig, exclude=NOT_FOR_TEXT).build_group(
        parser, "tokenizer"
    )
    group.description = "Megatron's flags: give the same values to training."


def check_tokenizer_arguments(args: Namespace) -> None:
    """Refuse flags from which no tokenizer can be built.

    Raises:
        ValueError: a flag is refused; the message names it.
    """
    kind: str | None = args.tokenizer_type
    if kind not in TEXT_TOKENIZERS:
        raise ValueError(
            f"--tokenizer-type {kind}: must be one of the text tokenizers "
            f"{', '.join(TEXT_TOKENIZERS)}"
        )
    if kind in MODEL_FILE_TOKENIZERS and not args.tokenizer_model:
        raise ValueError(f"--tokenizer-model is required with --tokenizer-type {kind}")
    if kind == "NullTokenizer" and not args.vocab_size:
        raise ValueError("--vocab-size is required with --tokenizer-type NullTokenizer")


def complete_tokenizer_arguments(args: Namespace) -> None:
    """With `--tokenizer-sentencepiece-legacy`, add the special tokens of EE-LLM (arXiv 2312.04916)
    and older Megatron, which megatron-core leaves to its callers.

    Raises:
        ValueError: a flag contradicts it, or the model cannot be read.
    """
    if not args.tokenizer_sentencepiece_legacy:
        if args.vocab_extra_ids:
            raise ValueError(
                f"--vocab-extra-ids {args.vocab_extra_ids}: has no effect without "
                "--tokenizer-sentencepiece-legacy, allowed: 0"
            )
        return
    if args.tokenizer_type not in SP_TOKENIZERS:
        raise ValueError(
            "--tokenizer-sentencepiece-legacy has no effect with --tokenizer-type "
            f"{args.tokenizer_type}, allowed with: {', '.join(SP_TOKENIZERS)}"
        )
    if isinstance(args.special_tokens, list):
        raise ValueError(
            "--tokenizer-special-tokens cannot be combined with --tokenizer-sentencepiece-legacy, "
            "which adds those of older Megatron"
        )
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: is not a SentencePiece model"
        ) from error
    args.special_tokens = legacy_special_tokens(model, args.vocab_extra_ids or 0)


def build_text_tokenizer(args: Namespace) -> TextTokenizer:
    """The tokenizer that training builds from the same flags.

    Raises:
        ValueError: a flag is missing, its file cannot be used, or --vocab-size contradicts the
            tokenizer.
    """
    check_tokenizer_arguments(args)
    complete_tokenizer_arguments(args)
    kind: str = args.tokenizer_type
    try:
        chosen = Namespace(**vars(args), pad_vocab_size=False, chat_template=None)
        tokenizer = cast(TextTokenizer, build_tokenizer(chosen))
    except Exception as error:  # each library has its own way of refusing a file
        reason = one_line(error)
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: cannot be used as {kind} ({reason})"
        ) from error
    if args.vocab_size and kind not in SIZED_BY_FLAG and args.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {args.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens"
        )
    return tokenizer
