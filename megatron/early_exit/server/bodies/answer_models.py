"""What answers of all kinds have in common."""

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class Head(BaseModel):
    """The best token of one head on the way to a token."""

    layer: int
    token: str
    confidence: float


class PromptTokensDetails(BaseModel):
    """What became of the tokens of a request's prompts."""

    cached_tokens: int = Field(
        description="Those that were not computed, since an earlier request began with them."
    )


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SpeculativeDecoding(BaseModel):
    """What drafting has brought, under vLLM's names."""

    num_spec_steps: int = Field(description="Verifications.")
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    mean_acceptance_length: float = Field(description="Tokens per verification.")
    draft_acceptance_rate: float
    """Share of the drafted tokens that the whole model accepted."""
    num_mtp_draft_tokens: int = Field(description="Of them, by multi-token prediction.")
    num_accepted_mtp_draft_tokens: int
    num_undrafted_tokens: int = Field(
        description="Tokens for which no draft was tried, since drafts had made decoding slower."
    )


class RequestMetrics(BaseModel):
    """Where the tokens of a request came from, and how long they took."""

    mode: str
    early_exit_threshold: float | None
    exit_measure: str | None = Field(description="What confidence was, in mode early_exit.")
    exit_thresholds: list[float] | None
    exit_threshold_decay: float | None
    kv_policy: str | None
    exits_pay_at: int | None
    num_unasked_tokens: int | None = Field(
        description="Tokens that no exit could give, since exits had made decoding slower by "
        "exits_pay_at; in mode early_exit."
    )
    num_layers: int
    mean_exit_layer: float | None
    """Number of layers run for a token, on average."""
    exit_tokens: dict[str, int] = Field(description="Tokens by the layer that gave them.")
    time_to_first_token_seconds: float
    decode_seconds: float
    tokens_per_second: float = Field(description="Of all its texts together, after the first.")
    speculative_decoding: SpeculativeDecoding | None
