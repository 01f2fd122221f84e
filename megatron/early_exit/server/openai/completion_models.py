"""The bodies of `/v1/completions`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from megatron.early_exit.ranges import Range
from megatron.early_exit.server.bodies.answer_models import (
    FinishReason,
    Head,
    RequestMetrics,
    Usage,
)
from megatron.early_exit.server.bodies.fields import Natural, SamplingFields
from megatron.early_exit.server.bodies.ranges import InRange
from megatron.early_exit.server.bodies.stream_options import StreamOptions
from megatron.early_exit.server.bodies.unsupported import COMPLETION

_TEXT_OR_TOKENS = "a text, a list of texts, a list of token ids, or a list of such lists"

Prompt = str | list[int]


def _as_prompts(value: object) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(map(_is_token, value)):
            return [value]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one and all(map(_is_token, one)) for one in value):
            return value
    raise ValueError(f"allowed: {_TEXT_OR_TOKENS}, none of them empty")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_TOKENS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
}
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ],
            "description": f"One prompt or several: {_TEXT_OR_TOKENS}.",
        }
    ),
]


class CompletionRequest(SamplingFields):
    """OpenAI's request for the continuation of texts, and early-exit fields."""

    unsupported = COMPLETION

    prompt: Prompts
    model: str | None = None
    max_tokens: Natural | None = Field(None, description="Default: 16.")
    n: Annotated[int, InRange(Range(least=1, most=16))] = 1
    best_of: Annotated[int, InRange(Range(least=1, most=16))] | None = Field(
        None, description="Not supported but for the value of n."
    )
    logprobs: Annotated[int, InRange(Range(least=0, most=20))] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    add_special_tokens: bool = Field(
        True, description="Frame texts as the tokenizer does; false gives their own tokens alone."
    )


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry for each token; with `echo` the prompt's first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    exit_layers: list[int | None]
    confidences: list[float | None]
    heads: list[list[Head] | None] | None = None


class CompletionChoice(BaseModel):
    """One text, or what is new of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The texts; of a stream, one event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
