"""What an engine answers."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class HeadReport:
    """The best token of one head on the way to a token."""

    layer: int
    """Number of backbone layers before the head."""
    token_id: int
    """Its most probable token."""
    confidence: float
    """How sure it was, 0 to 1, by the measure of the request."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """The score of one token of a prompt."""

    token_id: int
    """Id of the prompt's token that is scored."""
    logprob: float | None
    """Logarithm of its probability behind those before it; None for the first."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens in its place, as many as were asked for."""
    exit_layer: int | None = None
    """Number of backbone layers behind the score; None for the first."""
    confidence: float | None = None
    """How sure the head there was, by the measure of the request; None for the first."""


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token, as it leaves the engine."""

    token_id: int
    """Id of the generated token."""
    text: str | None
    """What the token adds to the text; empty while it is part of an unfinished character, None for
    a model without a tokenizer."""
    exit_layer: int
    """Number of backbone layers behind the choice of the token."""
    confidence: float
    """How sure the head was that chose the token: by the measure of a request in mode `early_exit`,
    else the largest softmax probability."""
    logprob: float
    """Logarithm of the token's own probability there, before temperature and filters."""
    finish_reason: FinishReason | None = None
    """Why this is the last token; None if it is not."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their log-probabilities, as many as were asked for."""
    heads: tuple[HeadReport, ...] = ()
    """With `exit_details`, what each head on the way found best."""
    offset: int = 0
    """Where the token begins: characters of the text before it, or before the character that it is
    a part of; those that are held back, or cut with a stop string, count."""


@dataclass(slots=True)
class DraftCounts:
    """How self-speculation has gone."""

    verifications: int = 0
    """How often the full model has run, with drafts to look at or without."""
    drafted: int = 0
    """Tokens that an exit has drafted, or the multi-token-prediction module."""
    accepted: int = 0
    """Those that the full model has agreed with."""
    undrafted: int = 0
    """Tokens for which nothing was to draft, since drafts had made decoding slower."""
    mtp_drafted: int = 0
    """Of the drafted tokens, those of the module."""
    mtp_accepted: int = 0
    """Of the accepted ones, those of the module."""


@dataclass(frozen=True, slots=True)
class GenerationStatistics:
    """Where the time of one request went."""

    num_prompt_tokens: int
    """Tokens of the prompt."""
    num_generated_tokens: int
    """Tokens of the continuation."""
    prefill_seconds: float
    """From the start to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    started: float = 0.0
    """The start, in seconds by `time.perf_counter`."""
    drafts: DraftCounts | None = None
    """In mode `self_speculative`."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were not computed, since an earlier request began with them."""
    num_unasked_tokens: int = 0
    """With `exits_pay_at`, those that no exit could give, since exits had made decoding slower;
    they were not asked, or for `exit_details` alone."""

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0 where there is only one."""
        decoded = self.num_generated_tokens - 1
        return decoded / self.decode_seconds if decoded > 0 else 0.0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The continuation of one prompt; the lists are parallel, one entry for each token."""

    prompt_token_ids: list[int]
    """The tokens of the prompt."""
    token_ids: list[int]
    """The tokens of the continuation."""
    text: str | None
    """The continuation alone; None for a model without a tokenizer."""
    token_texts: list[str] | None
    """What each token adds to `text`."""
    exit_layers: list[int]
    """Number of backbone layers behind the choice of each token."""
    confidences: list[float]
    """How sure the head was that chose each token: by the measure of a request in mode
    `early_exit`, else the largest softmax probability."""
    logprobs: list[float]
    """Logarithm of each token's own probability there, before temperature and filters."""
    finish_reason: FinishReason
    """Why the text ended."""
    statistics: GenerationStatistics
    """Where the time went."""
    stop_reason: str | int | None = None
    """The stop string or the token that ended it; None for the end of a document."""
    error: str | None = None
    """What went wrong, where `finish_reason` is `error`."""
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """For each token, the most probable ones in its place, as many as were asked for."""
    heads: list[tuple[HeadReport, ...]] = field(default_factory=list)
    """With `exit_details`, what each head on the way to each token found best."""
    prompt_tokens: list[PromptToken] | None = None
    """Scores of the prompt, where they were asked for and it was not cancelled before."""
