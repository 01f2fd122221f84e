"""One request on its way through an engine."""

from time import perf_counter

from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.inference.modes import Choice, DecodingMode
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    GenerationResult,
    GenerationStatistics,
)
from megatron.early_exit.inference.text import TextStream


class Request:
    """What an engine knows of a request: its tokens, and whether it has ended.

    Args:
        key: names it in the engine.
        prompt: its token ids.
        params: how to continue.
        room: most tokens that it may get.
        stops: tokens that end it.
        mode: how it gets its tokens.
        generated: list that its tokens go into; the mode reads it.
        tokenizer: None where the model has none.
    """

    def __init__(
        self,
        key: int,
        prompt: list[int],
        params: SamplingParams,
        room: int,
        stops: frozenset[int],
        mode: DecodingMode,
        generated: list[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.key, self.prompt, self.params = key, prompt, params
        self.room, self.mode, self.generated = room, mode, generated
        self.tokens: list[GeneratedToken] = []
        self.error: str | None = None
        self._stops = stops
        self._text = None if tokenizer is None else TextStream(tokenizer, prompt)
        self._times = [perf_counter()] * 3

    @property
    def length(self) -> int:
        """Tokens of the prompt, generated ones, and drafts."""
        return len(self.prompt) + len(self.generated) + len(self.mode.drafts)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or bool(self.tokens and self.tokens[-1].finish_reason)

    def token_ids(self, start: int, end: int) -> list[int]:
        """The tokens at some positions."""
        first = len(self.prompt)
        if start >= first:
            behind = self.generated
            if end > first + len(behind):
                behind = [*behind, *self.mode.drafts]
            return behind[start - first : end - first]
        return [*self.prompt, *self.generated, *self.mode.drafts][start:end]

    def take(self, choice: Choice) -> GeneratedToken:
        """Add a token."""
        self._times[1 if not self.tokens else 2] = perf_counter()
        self.generated.append(choice.token_id)
        reason: FinishReason | None = None
        if choice.token_id in self._stops:
            reason = "stop"
        elif len(self.generated) == self.room:
            reason = "length"
        piece = None
        if self._text is not None:
            at_end = reason is not None
            stopped = reason == "stop"
            piece = self._text.flush() if stopped else self._text.add(choice.token_id, at_end)
        token = GeneratedToken(
            choice.token_id,
            piece,
            choice.exit_layer,
            choice.confidence,
            choice.logprob,
            reason,
            choice.top_logprobs,
            choice.heads,
        )
        self.tokens.append(token)
        return token

    def fail(self, error: str) -> None:
        """End it with an error; what it has got so far stays."""
        self.error = error

    def result(self) -> GenerationResult:
        """The answer; the request has ended."""
        tokens = self.tokens
        texts = None if self._text is None else [token.text or "" for token in tokens]
        start, first, end = self._times
        count = len(tokens)
        reason: FinishReason = "error"
        if self.error is None:
            assert tokens[-1].finish_reason is not None
            reason = tokens[-1].finish_reason
        return GenerationResult(
            prompt_token_ids=self.prompt,
            token_ids=[token.token_id for token in tokens],
            text=None if texts is None else "".join(texts),
            token_texts=texts,
            exit_layers=[token.exit_layer for token in tokens],
            confidences=[token.confidence for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=reason,
            statistics=GenerationStatistics(
                len(self.prompt), count, first - start, end - first if count > 1 else 0.0
            ),
            error=self.error,
            top_logprobs=[token.top_logprobs for token in tokens],
            heads=[token.heads for token in tokens],
        )
