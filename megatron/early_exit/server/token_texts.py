"""What tokens look like in answers."""

from collections.abc import Sequence
from functools import lru_cache

from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.inference.decoding.results import HeadReport
from megatron.early_exit.inference.decoding.text import TextStream
from megatron.early_exit.server.answer_models import Head

_LEAST_LOGPROB = -9999.0
_ANCHOR = "a"
"""A text to decode tokens behind: at the beginning of a text, some tokenizers drop spaces."""


class TokenTexts:
    """The text of each token by itself.

    Args:
        tokenizer: None where the model knows no text: a token then is its number.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = [] if tokenizer is None else tokenizer.encode(_ANCHOR, False)[-1:]
        self._length = 0 if tokenizer is None else len(tokenizer.decode(self._before))
        self.of = lru_cache(maxsize=2**16)(self._of)

    def _of(self, token_id: int) -> str:
        if self._tokenizer is None:
            return str(token_id)
        return self._tokenizer.decode([*self._before, token_id])[self._length :]

    def lengths(self, token_ids: Sequence[int]) -> list[int]:
        """How many characters each token adds to the text of them all."""
        if self._tokenizer is None:
            return [0] * len(token_ids)
        stream = TextStream(self._tokenizer, [])
        return [len(stream.add(token_id)) for token_id in token_ids]

    def heads(self, reports: Sequence[HeadReport]) -> list[Head]:
        """What the heads on the way to a token found best."""
        return [
            Head(layer=one.layer, token=self.of(one.token_id), confidence=one.confidence)
            for one in reports
        ]


def as_number(logprob: float) -> float:
    """A logarithm of probability that JSON has a number for: that of 0 is -9999, as in vLLM."""
    return max(logprob, _LEAST_LOGPROB)
