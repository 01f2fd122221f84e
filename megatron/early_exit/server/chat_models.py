"""The bodies of `/v1/chat/completions`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from megatron.early_exit.server.answer_models import FinishReason, Head, RequestMetrics, Usage
from megatron.early_exit.server.completion_models import StreamOptions
from megatron.early_exit.server.fields import Index, RequestModel, SamplingFields


class TextPart(RequestModel):
    """A part of a message; only texts are supported."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """What was said."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(RequestModel):
    """Only plain text is supported."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """OpenAI's request for the next turn of a conversation, and early-exit fields."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    model: str | None = None
    max_tokens: Index | None = Field(None, description="Default: what the context has room for.")
    max_completion_tokens: Index | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class Candidate(BaseModel):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


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


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
