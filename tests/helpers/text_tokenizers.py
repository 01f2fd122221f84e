"""Small tokenizers of every kind that inference decodes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from megatron.early_exit.checkpoint.tokenizer import (
    Tokenizer,
    TokenizerDescription,
    load_tokenizer,
)

CORPUS = [
    "def main():",
    "    return the answer",
    "a list  of  spaces",
    "print(value), don't",
    "日本語の文章です。",
    "한국어 문장",
    "naïve café 😀 😃 👩‍👩‍👧",
]
SENTENCEPIECE_OPTIONS: dict[str, dict[str, Any]] = {
    "sentencepiece": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "sentencepiece, dummy prefix": {"remove_extra_whitespaces": False},
    "sentencepiece, folded spaces": {},
    "sentencepiece, suffixes": {"treat_whitespace_as_suffix": True},
    "sentencepiece, no bytes": {"byte_fallback": False},
}
TRANSFORMERS_KINDS = (
    "byte level",
    "byte fallback",
    "metaspace",
    "word pieces",
    "word ends",
    "no decoder",
)
KINDS = (*SENTENCEPIECE_OPTIONS, *TRANSFORMERS_KINDS)
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]


def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece model of letters, bytes and some words."""
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


def make_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer of one of `KINDS`, its files in `folder`."""
    if kind in SENTENCEPIECE_OPTIONS:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(**SENTENCEPIECE_OPTIONS[kind]))
        description = TokenizerDescription("SentencePieceTokenizer", "tokenizer.model")
    else:
        _save_transformers(kind, folder)
        description = TokenizerDescription("HuggingFaceTokenizer", ".")
    tokenizer = load_tokenizer(description, folder)
    assert tokenizer is not None
    return tokenizer


def _save_transformers(kind: str, folder: Path) -> None:
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    common = {"show_progress": False, "special_tokens": _SPECIAL_TOKENS}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    make: Callable[..., Any] = trainers.BpeTrainer
    model, before, after = models.BPE(), pre_tokenizers.Metaspace(), decoders.Metaspace()
    normalizer: Any = None
    if kind == "byte level":
        common |= {"initial_alphabet": alphabet, "vocab_size": 330}
        before, after = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "byte fallback":
        common["special_tokens"] = [*_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
        common |= {"vocab_size": 330}
        model = models.BPE(byte_fallback=True, unk_token="<unk>")
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        before = None
        after = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    elif kind == "word pieces":
        model, make = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer
        before, after = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif kind == "word ends":
        model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
        common["end_of_word_suffix"] = "</w>"
        before, after = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    elif kind == "no decoder":
        model, make = models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer
        before, after = pre_tokenizers.Whitespace(), None
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if before is not None:
        backend.pre_tokenizer = before
    if after is not None:
        backend.decoder = after
    backend.train_from_iterator(CORPUS * 5, make(**common))
    if kind == "byte fallback":
        backend = _with_plain_bytes(backend)
    # One that is no byte, in letters that no alphabet of bytes has.
    backend.add_tokens(["<☯ ☯>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def _with_plain_bytes(backend: Any) -> Any:
    """The trainer makes them special tokens, which a text lacks."""
    import json

    import tokenizers

    values = json.loads(backend.to_str())
    values["added_tokens"] = [
        one for one in values["added_tokens"] if not one["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(values))
