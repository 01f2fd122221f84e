"""Texts by a SentencePiece model, as Megatron reads it."""

from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.utf8 import fallback_byte


class SentencePieceText:
    """See `Tokenizer`.

    Args:
        path: the model's file.
        eod_id: the token that ends a document; None is the model's own.

    Raises:
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path, eod_id: int | None) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer {path}: is not a SentencePiece model") from error
        begin, end = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = None if begin < 0 else begin
        self.eod_id = eod_id if eod_id is not None or end < 0 else end
        self.other_end_ids: tuple[int, ...] = ()
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

    def token_bytes(self, token_id: int) -> bytes | None:
        if token_id >= self.vocab_size:
            return b""
        if not self._processor.is_byte(token_id):
            return None
        value = fallback_byte(self._processor.id_to_piece(token_id))
        return None if value is None else bytes([value])

    def unfinished_length(self, data: bytes) -> int:
        return len(data)

    def token_name(self, token_id: int) -> str | None:
        return self._processor.id_to_piece(token_id) if token_id < self.vocab_size else None
