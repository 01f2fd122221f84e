"""A tokenizer with a SentencePiece model, as Megatron uses it."""

import re
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.utf8 import fallback_byte
from megatron.early_exit.legacy_tokens import number_legacy_tokens


class SentencePieceText:
    """See `Tokenizer`.

    Args:
        path: the model's file.
        eod_id: the token that ends a document; None is the model's own.
        legacy: texts have the special tokens of older Megatron, see `legacy_special_tokens`.
        num_extra_ids: `--vocab-extra-ids`, which count in legacy mode.

    Raises:
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(
        self, path: Path, eod_id: int | None, legacy: bool = False, num_extra_ids: int = 0
    ) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer {path}: is not a SentencePiece model") from error
        begin, end = self._processor.bos_id(), self._processor.eos_id()
        self._num_pieces: int = self._processor.get_piece_size()
        self._special = number_legacy_tokens(self._processor, num_extra_ids) if legacy else {}
        self._added = {one: text for text, one in self._special.items() if one >= self._num_pieces}
        if legacy:
            end = self._special["<EOD>"]
            begin = self._special["<BOS>"] if begin < 0 else begin
        self.bos_id = None if begin < 0 else begin
        self.eod_id = eod_id if eod_id is not None or end < 0 else end
        self.other_end_ids: tuple[int, ...] = ()
        self.chat_template = None
        self.vocab_size = self._num_pieces + len(self._added)

    def drops_extra_spaces(self) -> bool:
        """Whether the model itself replaces several spaces by one."""
        return bool(self.encode("x  y") == self.encode("x y"))

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of `bos_token`, `eos_token` and `pad_token`; None where there is none."""
        own = self._processor
        ids = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
        return {name: None if one < 0 else own.id_to_piece(one) for name, one in ids.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text; no others frame it, whatever is asked for."""
        # Megatron frames texts with no tokens of SentencePiece's.
        ids: list[int] = []
        rest = text
        while match := self._next_special(rest):
            ids += [*self._encode_part(rest[: match.start()], ids), self._special[match[0]]]
            rest = rest[match.end() :]
        return [*ids, *self._processor.encode(rest)]

    def _next_special(self, text: str) -> re.Match[str] | None:
        if not self._special:
            return None
        return re.search("|".join(map(re.escape, self._special)), text)

    def _encode_part(self, text: str, before: list[int]) -> list[int]:
        """The tokens of a text between special tokens; a single space after a special token is left
        out."""
        part = list(self._processor.encode(text))
        is_behind_special = bool(before) and before[-1] in self._special.values()
        if is_behind_special and part[:1] == [self._processor.piece_to_id("\u2581")]:
            return part[1:]
        return part

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Refuse: there are no templates of conversations here.

        Raises:
            ValueError: always.
        """
        raise ValueError("a SentencePiece tokenizer has no chat template")

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens; ids behind the last piece of the file have none."""
        # Megatron may have given a model more tokens than its SentencePiece file has pieces.
        pieces = [token for token in token_ids if token < self._num_pieces]
        return str(self._processor.decode(pieces))

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that may be a part of a character; empty for one without text, None
        for any other."""
        if token_id >= self._num_pieces:
            return b""
        if not self._processor.is_byte(token_id):
            return None
        value = fallback_byte(self._processor.id_to_piece(token_id))
        return None if value is None else bytes([value])

    def unfinished_length(self, data: bytes) -> int:
        """How many U+FFFD `decode` gives for the first bytes of a character."""
        return len(data)

    def token_name(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary; None if the vocabulary lacks it."""
        if token_id < self._num_pieces:
            return str(self._processor.id_to_piece(token_id))
        return self._added.get(token_id)
