"""A tokenizer of transformers."""

import json
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.utf8 import (
    REPLACEMENT,
    byte_level_alphabet,
    fallback_byte,
    without_invalid,
)


class HuggingFaceText:
    """See `Tokenizer`.

    Args:
        path: a folder that transformers loads.
        eod_id: the token that ends a document; None is the tokenizer's own.
        adds_special_tokens: prompts get the special tokens that the tokenizer puts around texts.
        other_end_ids: further tokens that end a text, besides `eod_id` and the tokenizer's own.

    Raises:
        ValueError: transformers is not installed, or cannot load the tokenizer.
    """

    def __init__(
        self,
        path: Path,
        eod_id: int | None,
        adds_special_tokens: bool,
        other_end_ids: tuple[int, ...],
    ) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"tokenizer {path}: HuggingFaceTokenizer needs the transformers package"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"tokenizer {path}: {error}") from error
        self._adds_special_tokens = adds_special_tokens
        own_end: int | None = self._tokenizer.eos_token_id
        self.eod_id = own_end if eod_id is None else eod_id
        ends = (*other_end_ids, *(() if own_end is None else (own_end,)))
        self.other_end_ids = tuple(one for one in dict.fromkeys(ends) if one != self.eod_id)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        template = self._tokenizer.chat_template
        # There may be several under names of their own.
        is_named = isinstance(template, dict)
        self.chat_template: str | None = template.get("default") if is_named else template
        self.vocab_size = len(self._tokenizer)
        self._read_decoder()

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of `bos_token`, `eos_token` and `pad_token`; None where there is none."""
        names = ("bos_token", "eos_token", "pad_token")
        return {name: getattr(self._tokenizer, name) for name in names}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, framed as the model's makers do it where that is asked for."""
        framed = add_special_tokens and self._adds_special_tokens
        return list(self._tokenizer(text, add_special_tokens=framed).input_ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model is to answer.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
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
        """The text of tokens; bytes that are not a complete character become U+FFFD."""
        text = str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if self._decoder is None or REPLACEMENT not in text:
            return text
        names = [self.token_name(one) for one in token_ids if one not in self._left_out]
        return str(self._decoder.decode(without_invalid([one for one in names if one is not None])))

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that may be a part of a character; empty for one without text, None
        for any other."""
        name = self.token_name(token_id)
        if name is None or token_id in self._left_out:
            return b""
        if self._alphabet:
            bytes_ = [self._alphabet.get(character) for character in name]
            # An added token may have other characters.
            is_whole = None in bytes_
            return name.encode() if is_whole else bytes(one for one in bytes_ if one is not None)
        value = fallback_byte(name) if self._has_fallback else None
        return None if value is None else bytes([value])

    def unfinished_length(self, data: bytes) -> int:
        """How many U+FFFD `decode` gives for the first bytes of a character."""
        return 1 if self._alphabet else len(data)

    def token_name(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary; None if the vocabulary lacks it."""
        try:
            name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):
            return None
        return name

    def _read_decoder(self) -> None:
        """Find out how the decoder treats tokens: as bytes, as text, or by leaving them out."""
        self._left_out = frozenset(self._tokenizer.all_special_ids)
        self._decoder: Any = None
        self._alphabet: dict[str, int] = {}
        self._has_fallback = True
        if not self._tokenizer.is_fast:
            return
        backend = self._tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        self._left_out = frozenset(one for one, token in added.items() if token.special)
        kinds = _kinds(json.loads(backend.to_str())["decoder"])
        self._has_fallback = "ByteFallback" in kinds
        if "ByteLevel" in kinds:
            self._alphabet = byte_level_alphabet()
        elif self._has_fallback:
            self._decoder = backend.decoder


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder and of its parts."""
    if decoder is None:
        return set()
    parts = (_kinds(one) for one in decoder.get("decoders", ()))
    return {decoder["type"]}.union(*parts)
