"""Make the demo's text and tokenizer from what every machine has: the sources of Python's standard
library and Python's reference manual.

    python examples/quickstart/corpus.py --output-dir data --vocab-size 4096

writes data/train.jsonl, data/validation.jsonl and data/tokenizer.model, the same on every run with
the same Python."""

from __future__ import annotations

import argparse
import io
import json
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron.early_exit.data.standard_library import (
    SPACE_MARK,
    is_prose_or_code,
    standard_library_texts,
)

LONGEST_INDENT = 24

UNK, BOS, EOS, PAD = range(4)
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 32768


@dataclass(frozen=True)
class Corpus:
    """The files of the demo's data."""

    train: Path
    validation: Path
    tokenizer_model: Path


def split(texts: Sequence[str], validation_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Shuffled training and validation texts; the latter have that share of all characters."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    wanted = validation_share * sum(map(len, shuffled))
    validation: list[str] = []
    while sum(map(len, validation)) < wanted:
        validation.append(shuffled.pop())
    return shuffled, validation


def write_json_lines(path: Path, texts: Sequence[str]) -> None:
    """Write one document per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model that gives every text back exactly, spaces and newlines included.

    Indentations and newlines are tokens of their own; unknown characters become bytes. Raises
    ValueError for a vocabulary size that these texts do not allow."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"--vocab-size {vocab_size}: must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
        )
    indents = [SPACE_MARK * width for width in range(2, LONGEST_INDENT + 1)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines(keepends=True)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            required_chars="".join(c for c in string.printable if not c.isspace()),
            user_defined_symbols=["\n", "\n\n", *indents],
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"--vocab-size {vocab_size}: does not suit the texts ({error})") from error
    return model.getvalue()


def build_corpus(
    output_dir: Path, *, vocab_size: int = 4096, validation_share: float = 0.05, seed: int = 1234
) -> Corpus:
    """Write the texts and the tokenizer into `output_dir`."""
    texts = [text for text in standard_library_texts() if is_prose_or_code(text)]
    train, validation = split(texts, validation_share, seed)
    corpus = Corpus(
        train=output_dir / "train.jsonl",
        validation=output_dir / "validation.jsonl",
        tokenizer_model=output_dir / "tokenizer.model",
    )
    tokenizer = train_tokenizer(train, vocab_size)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json_lines(corpus.train, train)
    write_json_lines(corpus.validation, validation)
    corpus.tokenizer_model.write_bytes(tokenizer)
    return corpus


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns its exit status."""
    parser = argparse.ArgumentParser(description="Make the demo's text and tokenizer.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of the split (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        corpus = build_corpus(args.output_dir, vocab_size=args.vocab_size, seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in (corpus.train, corpus.validation, corpus.tokenizer_model):
        print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
