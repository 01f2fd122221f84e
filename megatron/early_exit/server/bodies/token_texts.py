"""What tokens look like in answers."""

from collections.abc import Sequence
from functools import lru_cache

from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.inference.engine.text import TextStream
from megatron.early_exit.inference.results import HeadReport
from megatron.early_exit.server.bodies.answer_models import Head

_LEAST_LOGPROB = -9999.0
_ANCHOR = "a"
"""A text to decode tokens behind: at the beginning of a text, some tokenizers drop spaces."""


class TokenTexts:
    """Each token by itself: its text, or a name in the place of one.

    Args:
        tokenizer: None where the model knows no text: a token then is its number.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = [] if tokenizer is None else tokenizer.encode(_ANCHOR, False)[-1:]
        self._length = 0 if tokenizer is None else len(tokenizer.decode(self._before))
        self.of = lru_cache(maxsize=2**16)(self._of)

    def _of(self, token_id: int) -> str:
        """The text of a token. A part of a character is its bytes, as OpenAI writes them; a token
        without a text, the end of a document say, is what the vocabulary calls it."""
        if self._tokenizer is None:
            return str(token_id)
        data = self.bytes_of(token_id)
        if data is None:
            return self._tokenizer.token_name(token_id) or as_token_id(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_as_ascii, data))

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token's text; None where it has none."""
        if self._tokenizer is None:
            return None
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            text = self._tokenizer.decode([*self._before, token_id])
            data = text[self._length :].encode()
        return data or None

    def offsets(self, token_ids: Sequence[int]) -> list[int]:
        """Where each token begins in the text of them all."""
        if self._tokenizer is None:
            return [0] * len(token_ids)
        stream, length, found = TextStream(self._tokenizer, []), 0, []
        for token_id in token_ids:
            piece = stream.add(token_id)
            found.append(length + stream.num_before)
            length += len(piece)
        return found

    def heads(self, reports: Sequence[HeadReport]) -> list[Head]:
        """What the heads on the way to a token found best."""
        return [
            Head(layer=one.layer, token=self.of(one.token_id), confidence=one.confidence)
            for one in reports
        ]


def as_number(logprob: float) -> float:
    """A logarithm of probability that JSON has a number for: that of 0 is -9999, as in vLLM."""
    return max(logprob, _LEAST_LOGPROB)


def as_token_id(token_id: int) -> str:
    """A token's number where a name is wanted, as in vLLM."""
    return f"token_id:{token_id}"


def _as_ascii(byte: int) -> str:
    is_plain = 0x20 <= byte < 0x7F and byte != ord("\\")
    return chr(byte) if is_plain else f"\\x{byte:02x}"
