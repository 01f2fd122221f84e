"""What single tokens look like."""

from functools import lru_cache

from megatron.early_exit.checkpoint.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for; vLLM has the same."""
_ANCHOR = "a"
"""A text to decode tokens behind: at the beginning of a text, some tokenizers drop spaces."""


class TokenTexts:
    """The text of each token by itself.

    Args:
        tokenizer: None where the model knows no text: a token then is its number.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = [] if tokenizer is None else tokenizer.encode(_ANCHOR)[-1:]
        self._length = 0 if tokenizer is None else len(tokenizer.decode(self._before))
        self.of = lru_cache(maxsize=2**16)(self._of)

    def _of(self, token_id: int) -> str:
        if self._tokenizer is None:
            return str(token_id)
        return self._tokenizer.decode([*self._before, token_id])[self._length :]
