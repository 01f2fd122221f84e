"""Text of a growing list of tokens, piece by piece."""

from megatron.early_exit.checkpoint.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""Most tokens that one character can be spread over: bytes of its UTF-8 form."""


class TextStream:
    """What each new token adds to the text behind a prompt.

    A token is decoded together with the few before it, because spaces and characters may depend on
    them; pieces joined are the text that the tokenizer gives for all tokens at once.

    Args:
        tokenizer: decodes.
        prompt_token_ids: the tokens before the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = prompt_token_ids[-_LONGEST_CHARACTER:]
        self._given = len(tokenizer.decode(self._window))
        self._waiting = 0

    def add(self, token_id: int, is_last: bool = False) -> str:
        """The text that is certain now and was not before the token."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        self._waiting += 1
        unfinished = text.endswith(_UNFINISHED) and self._waiting < _LONGEST_CHARACTER
        if unfinished and not is_last:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """The text that was still uncertain, when no token follows."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._window = self._window[-_LONGEST_CHARACTER:]
        self._given = len(self._tokenizer.decode(self._window))
        self._waiting = 0
        return piece
