"""The bodies of `/v1/chat/completions`."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from megatron.early_exit.ranges import ONE_OR_MORE, Range
from megatron.early_exit.server.bodies.answer_models import (
    FinishReason,
    Head,
    RequestMetrics,
    Usage,
)
from megatron.early_exit.server.bodies.fields import RequestModel, SamplingFields
from megatron.early_exit.server.bodies.ranges import InRange
from megatron.early_exit.server.bodies.stream_options import StreamOptions
from megatron.early_exit.server.bodies.unsupported import CHAT, MESSAGE, PARTS

Count = Annotated[int, InRange(ONE_OR_MORE)]


class TextPart(RequestModel):
    """A part of a message; only texts are supported."""

    type: Literal["text"]
    text: str


def _refuse_other_parts(value: object) -> object:
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in PARTS:
            raise PARTS[kind].refusal(f"messages: content of type {kind}", "messages")
    return value


Content = Annotated[str | list[TextPart], BeforeValidator(_refuse_other_parts)]


class Message(RequestModel):
    """One turn of a conversation."""

    unsupported = MESSAGE
    within = "messages"

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="Only an assistant's may lack.")
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates read it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        others = {"name": self.name, "tool_call_id": self.tool_call_id}
        given = {name: value for name, value in others.items() if value is not None}
        return {"role": self.role, "content": text, **given}


class ChatRequest(SamplingFields):
    """OpenAI's request for the next turn of a conversation, and early-exit fields."""

    unsupported = CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    model: str | None = None
    max_tokens: Count | None = Field(None, description="Default: what the context has room for.")
    max_completion_tokens: Count | None = Field(None, description="The same under its new name.")
    n: Annotated[int, InRange(Range(least=1, most=16))] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, InRange(Range(least=0, most=20))] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False


class Candidate(BaseModel):
    """A token that might have been chosen."""

    token: str = Field(description="Its text; `bytes:\\xe6` and the like for parts of characters.")
    logprob: float
    bytes: list[int] | None = Field(description="Of its text; null for a token that has none.")


class ChatToken(Candidate):
    """A token of the answer."""

    top_logprobs: list[Candidate]
    exit_layer: int
    confidence: float
    heads: list[Head] | None = None


class ChatLogprobs(BaseModel):
    """The tokens of the answer, or its new ones."""

    content: list[ChatToken]


class Answer(BaseModel):
    """The next turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics


class Delta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
