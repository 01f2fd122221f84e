"""One request on its way through an engine."""

from collections.abc import Iterable
from time import perf_counter

from megatron.early_exit.inference.engine.scoring import PrefixScore, TextScores
from megatron.early_exit.inference.engine.stopping import Stopping
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from megatron.early_exit.inference.modes.mode import DecodingMode, SampledToken
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    GenerationResult,
    GenerationStatistics,
    PromptToken,
)
from megatron.early_exit.inference.sequence import Sequence


class Request:
    """What an engine knows of a request: its tokens, and whether it has ended.

    Args:
        sequence: its tokens, and how far they have come.
        params: how to continue.
        mode: how the sequence gets its tokens.
        stopping: tells when it ends, and what its text is.
        echo: the text of the prompt, where it goes in front of the text.
        scoring: gets the scores of the prompt, where they are asked for.

    Attributes:
        tokens: what it has got so far.
        error: why it failed; None where it did not.
        exception: what made it fail, where that was one.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        mode: DecodingMode,
        stopping: Stopping,
        echo: str = "",
        scoring: TextScores | None = None,
    ) -> None:
        self.sequence, self.params, self.mode = sequence, params, mode
        self.tokens: list[GeneratedToken] = []
        self.scoring = scoring
        self.error: str | None = None
        self.exception: Exception | None = None
        self._stopping, self._echo = stopping, echo
        self._is_cancelled = False
        self._times = [perf_counter()] * 3

    @property
    def key(self) -> int:
        """Its name in the engine."""
        return self.sequence.key

    @property
    def prompt_token_ids(self) -> list[int]:
        """The token ids of its prompt."""
        return self.sequence.prompt

    @property
    def prompt_tokens(self) -> list[PromptToken] | None:
        """Scores of the prompt, where they were asked for and there are all."""
        return None if self.scoring is None else self.scoring.prompt_tokens()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why nothing more will come; None while something may."""
        if self.error is not None:
            return "error"
        if self._is_cancelled:
            return "cancelled"
        is_scored = self.scoring is None or self.scoring.is_complete
        return self._stopping.finish_reason if is_scored else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def seconds_to_first_token(self) -> float:
        """From its making to its first token, where it has one."""
        return self._times[1] - self._times[0]

    def take(self, sampled: SampledToken) -> GeneratedToken:
        """Add a token."""
        self._times[1 if not self.tokens else 2] = perf_counter()
        self.sequence.generated.append(sampled.token_id)
        piece = self._stopping.add(sampled.token_id)
        if not self.tokens and piece is not None:
            piece = self._echo + piece
        token = GeneratedToken(
            sampled.token_id,
            piece,
            sampled.exit_layer,
            sampled.confidence,
            sampled.logprob,
            self._stopping.finish_reason,
            sampled.top_logprobs,
            sampled.heads,
            self._stopping.offset,
        )
        self.tokens.append(token)
        return token

    def take_scores(self, scores: Iterable[PrefixScore]) -> None:
        """Add the scores of the next piece of the prompt."""
        assert self.scoring is not None
        self.scoring.add(scores)
        if not self.scoring.is_finite:
            self.fail(NOT_FINITE)

    def fail(self, error: str, exception: Exception | None = None) -> None:
        """End it with an error; what it has got so far stays."""
        self.error, self.exception = error, exception

    def cancel(self) -> None:
        """End it because nobody wants it any more; what it has got so far stays."""
        self._is_cancelled = not self.is_finished

    def result(self) -> GenerationResult:
        """The answer; the request has ended."""
        tokens, reason = self.tokens, self.finish_reason
        assert reason is not None
        texts = None if not self._stopping.has_text else [token.text or "" for token in tokens]
        start, first, end = self._times
        count = len(tokens)
        text = None if texts is None else "".join(texts) if texts else self._echo
        return GenerationResult(
            prompt_token_ids=self.prompt_token_ids,
            token_ids=[token.token_id for token in tokens],
            text=text,
            token_texts=texts,
            exit_layers=[token.exit_layer for token in tokens],
            confidences=[token.confidence for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=reason,
            statistics=GenerationStatistics(
                len(self.prompt_token_ids),
                count,
                first - start,
                end - first if count > 1 else 0.0,
                start,
                self.mode.counts,
                self.sequence.num_cached,
                self.mode.num_unasked,
            ),
            stop_reason=self._stopping.stop_reason,
            error=self.error,
            top_logprobs=[token.top_logprobs for token in tokens],
            heads=[token.heads for token in tokens],
            prompt_tokens=self.prompt_tokens,
        )
