"""When a sequence ends, and what of its text is certain before that."""

from collections.abc import Iterable, Mapping, Sequence

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.engine.text import TextStream
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import FinishReason


def stop_token_ids(
    params: SamplingParams, eod_id: int | None, other_end_ids: Iterable[int] = ()
) -> dict[int, int | None]:
    """The tokens that end a sequence, each with the `stop_reason` for it, as in vLLM; `eod_id` is
    the one that ends a document, `other_end_ids` are further ones that end a text."""
    found: dict[int, int | None] = {}
    if not params.ignore_eos:
        found |= {one: one for one in other_end_ids}
        found |= {} if eod_id is None else {eod_id: None}
    return found | {one: one for one in params.stop_token_ids}


class StopStrings:
    """Text piece by piece, cut before the stop string that is complete first.

    Of two that are complete with the same character, the longer one counts. Which one it is does
    not depend on how the text is divided into pieces. What may turn out to be the beginning of a
    stop string is held back until that is decided.

    Args:
        stops: texts of one character or more.

    Attributes:
        matched: the stop string that was found; nothing may be added behind it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def add(self, piece: str, may_stop: bool = True) -> str:
        """The text that is certain now and was not before the piece; with `may_stop` a stop string
        that is complete within the piece counts."""
        assert self.matched is None
        text = self._held + piece
        if may_stop and (match := self._first_match(text, len(self._held))):
            start, self.matched = match
            self._held = ""
            return text[:start]
        certain = len(text) - self._length_of_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that was still held back, when none follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Start of the stop string that is complete first behind `num_old` characters, and it."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches)[1:] if matches else None

    def _length_of_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Stopping:
    """Decides after each token of one request whether it was the last, and gives its text.

    As in vLLM, tokens up to number `min_tokens` end nothing: the sampler forbids those that would,
    and a stop string counts if a later token completes it. The text of a token that ends the
    sequence, and that of a stop string, are not part of the text; their tokens are among the
    tokens.

    Args:
        params: the request.
        token_ids: what ends the sequence, see `stop_token_ids`.
        room: most tokens that it may get: `params.max_tokens`, or less where the context is full.
        text: gives the text of tokens; None for a model without a tokenizer.

    Raises:
        FieldError: `params.stop` has texts, and there is no tokenizer.

    Attributes:
        num_tokens: tokens added.
        offset: characters of the text, a stop string's among them, before the last token; where
            that is a part of a character, before the character.
        finish_reason: why the last token was the last; None while it is not.
        stop_reason: the stop string or the token that ended the sequence; None for other ends, the
            end of a document among them.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_ids: Mapping[int, int | None],
        room: int,
        text: TextStream | None,
    ) -> None:
        if params.stop and text is None:
            problem = "needs a tokenizer that inference supports, and this model has none"
            raise FieldError("stop", problem, "()", value=params.stop)
        self.num_tokens = 0
        self.offset = 0
        self.finish_reason: FinishReason | None = "length" if room <= 0 else None
        self.stop_reason: str | int | None = None
        self._params, self._text = params, text
        self._token_ids, self._room = token_ids, room
        self._length = 0
        """Characters of the text, those held back for stop strings among them."""
        self._strings = StopStrings(params.stop)

    @property
    def has_text(self) -> bool:
        """Whether tokens have a text."""
        return self._text is not None

    def add(self, token_id: int) -> str | None:
        """Take the next token; gives the text that is certain now and was not before it.

        The texts joined, once `finish_reason` is set, are the text of the sequence. None is
        returned for a model without a tokenizer.
        """
        assert self.finish_reason is None
        self.num_tokens += 1
        self.offset = self._length
        may_stop = self.num_tokens > self._params.min_tokens
        if may_stop and token_id in self._token_ids:
            self.finish_reason = "stop"
            self.stop_reason = self._token_ids[token_id]
        elif self.num_tokens >= self._room:
            self.finish_reason = "length"
        return None if self._text is None else self._piece(self._text, token_id, may_stop)

    def _piece(self, text: TextStream, token_id: int, may_stop: bool) -> str:
        is_last = self.finish_reason is not None
        stopped = self.finish_reason == "stop"
        piece = text.flush() if stopped else text.add(token_id, is_last)
        if not stopped:
            self.offset += text.num_before
        self._length += len(piece)
        piece = self._strings.add(piece, may_stop)
        if self._strings.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._strings.matched
        elif is_last:
            piece += self._strings.flush()
        return piece
