"""Text of a growing list of tokens, piece by piece."""

from itertools import islice

from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.checkpoint.utf8 import REPLACEMENT, is_beginning, unfinished_end

_CONTEXT = 8
"""Tokens that are kept to decode the next one behind: its space may depend on them. An unfinished
character has fewer."""


class TextStream:
    """What each new token adds to the text behind a prompt.

    The text of the prompt and the pieces joined are what the tokenizer gives for all tokens at
    once. Only an unfinished character is held back, 3 bytes at most. One that the prompt begins and
    a later token finishes belongs to the pieces.

    Args:
        tokenizer: decodes.
        prompt_token_ids: the tokens before the text.

    Attributes:
        num_before: characters of the last piece that stand for bytes of tokens before the last one,
            which it has left unfinished for good.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self.num_before = 0
        self._tokenizer = tokenizer
        self._unfinished = b""
        """Bytes at the end that may become a character."""
        self._window: list[int] = []
        """The last tokens: so many that there is text among them, or else all."""
        self._most = 2 * _CONTEXT
        """Tokens in the window before it is cut."""
        self._given = 0
        """Characters of the window's text that are certain, and so have been given."""
        self._follow_prompt(prompt_token_ids)
        self._of_prompt = REPLACEMENT * self._num_unfinished()
        """How the text of the prompt ends where it leaves a character unfinished."""

    def add(self, token_id: int, is_last: bool = False) -> str:
        """The text that is certain now and was not before the token."""
        before, num_before = self._unfinished, self._num_unfinished()
        own_bytes = self._follow(token_id)
        is_end = own_bytes is None or not is_beginning(before + own_bytes[:1])
        self.num_before = num_before if is_end and not self._of_prompt else 0
        if own_bytes == b"":
            return self.flush() if is_last else ""
        self._window.append(token_id)
        piece = self._give(is_last)
        if not piece and own_bytes is None and not before:
            self._drop_idle()
        if len(self._window) > self._most:
            self._cut()
        return piece

    def flush(self) -> str:
        """The text that was still uncertain, when no token follows."""
        return self._give(is_last=True)

    def _follow_prompt(self, token_ids: list[int]) -> None:
        """Keep so much of the prompt that there is text in it, where there is any."""
        own_bytes = self._tokenizer.token_bytes
        count = _CONTEXT
        while True:
            behind = (one for one in reversed(token_ids) if own_bytes(one) != b"")
            self._window = list(islice(behind, count))[::-1]
            self._unfinished = b""
            for token_id in self._window[-_CONTEXT:]:
                self._follow(token_id)
            self._given = self._num_certain(self._window)
            if self._given or len(self._window) < count:
                break
            count *= 2
        self._most = 2 * max(_CONTEXT, len(self._window))

    def _follow(self, token_id: int) -> bytes | None:
        """Learn what is unfinished behind a token; gives its bytes."""
        own_bytes = self._tokenizer.token_bytes(token_id)
        if own_bytes is None:
            self._unfinished = b""
        elif own_bytes:
            self._unfinished = unfinished_end(self._unfinished + own_bytes)
        return own_bytes

    def _give(self, is_last: bool) -> str:
        text = self._tokenizer.decode(self._window)
        certain = len(text) - (0 if is_last else self._num_unfinished())
        piece, self._given = text[self._given : certain], certain
        if piece:
            piece, self._of_prompt = piece.removeprefix(self._of_prompt), ""
        return piece

    def _drop_idle(self) -> None:
        """Forget a last token that has no text: there may be thousands of them."""
        if self._given or self._window[-1] in self._window[-2:-1]:
            self._window.pop()

    def _cut(self) -> None:
        """Make the window as short as can be."""
        count = _CONTEXT
        while count < len(self._window):
            behind = self._window[-count:]
            if certain := self._num_certain(behind):
                self._window, self._given = behind, certain
                break
            count *= 2
        self._most = 2 * max(_CONTEXT, len(self._window))

    def _num_certain(self, token_ids: list[int]) -> int:
        return len(self._tokenizer.decode(token_ids)) - self._num_unfinished()

    def _num_unfinished(self) -> int:
        """Characters that stand for the unfinished one at the end of a text."""
        if not self._unfinished:
            return 0
        return self._tokenizer.unfinished_length(self._unfinished)
