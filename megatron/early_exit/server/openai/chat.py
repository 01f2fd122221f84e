"""`/v1/chat/completions`: OpenAI's conversations, by the tokenizer's chat template."""

from collections.abc import Iterator, Sequence

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.server.bodies.answer_models import FinishReason
from megatron.early_exit.server.bodies.stream_options import check_stream_options
from megatron.early_exit.server.bodies.token_texts import as_number
from megatron.early_exit.server.engine_thread.job import Tokens
from megatron.early_exit.server.http.errors import ERRORS, ApiError, of_field
from megatron.early_exit.server.openai.chat_models import (
    Answer,
    Candidate,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    ChatToken,
    ChunkChoice,
    Delta,
)
from megatron.early_exit.server.openai.job_answer import JobAnswer
from megatron.early_exit.server.service import Service, answer, client_is_gone


def chat(service: Service) -> APIBlueprint:
    """The endpoint."""
    blueprint = APIBlueprint("chat", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)

    @blueprint.post("/v1/chat/completions", responses={200: ChatResponse})
    def create_chat_completion(body: ChatRequest) -> Response:
        """Answer the last message of a conversation."""
        tokens = service.encode(_prompt(body, service), "messages", room=1)
        params = _params(body, service, len(tokens))
        for name in ("max_completion_tokens", "max_tokens"):
            service.check_limit(name, getattr(body, name), [tokens])
        job = service.submit([tokens], params, body.n, body.stream)
        pieces = ChatAnswer(body, params, service, job)
        if body.stream:
            return service.stream(job, pieces.events(job.tokens(client_is_gone())))
        service.finish(job)
        return answer(pieces.whole())

    return blueprint


def _prompt(body: ChatRequest, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        message = "messages: the model's tokenizer has no chat template, use /v1/completions"
        raise ApiError(400, message, "messages", "no_chat_template")
    try:
        return tokenizer.encode_chat([one.for_template() for one in body.messages])
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error


def _params(body: ChatRequest, service: Service, num_tokens: int) -> SamplingParams:
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: has no effect without logprobs", "top_logprobs")
    if body.exit_details and not body.logprobs:
        raise ApiError(400, "exit_details true: has no effect without logprobs", "exit_details")
    settings = service.model.settings(body.model)
    limits = {one for one in (body.max_completion_tokens, body.max_tokens) if one is not None}
    if len(limits) > 1:
        message = f"max_tokens {body.max_tokens}: contradicts max_completion_tokens"
        raise ApiError(400, message, "max_tokens")
    try:
        return SamplingParams(
            **body.sampling_params(),
            **body.exit_params(settings, len(service.model.exit_layers), service.model.num_depths),
            max_tokens=limits.pop() if limits else service.max_model_len - num_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
    except FieldError as error:
        raise of_field(error) from error


class ChatAnswer(JobAnswer[ChatRequest]):
    """See `JobAnswer`."""

    kind = "chatcmpl"

    def whole(self) -> ChatResponse:
        """The body, when all has ended."""
        choices = [
            ChatChoice(
                index=index,
                message=Answer(content=result.text or ""),
                finish_reason=_reason(result.finish_reason),
                stop_reason=result.stop_reason,
                logprobs=self._logprobs(self._job.requests[index].tokens),
                token_ids=result.token_ids if self._body.return_token_ids else None,
            )
            for index, result in enumerate(self._job.results())
        ]
        return ChatResponse(**self._head, choices=choices, **self._figures())

    def _events(self, batches: Iterator[Tokens]) -> Iterator[str]:
        for index in range(self._job.size):
            yield self._event(index, Delta(role="assistant", content=""))
        for batch in batches:
            pieces: dict[int, list[GeneratedToken]] = {}
            for index, token in batch:
                pieces.setdefault(index, []).append(token)
            for index, tokens in pieces.items():
                text = "".join(token.text or "" for token in tokens)
                yield self._event(index, Delta(content=text), tokens)
        if self._ends_with_figures:
            last = ChatChunk(**self._head, choices=[], **self._figures())
            yield last.model_dump_json()

    def _event(self, index: int, delta: Delta, tokens: Sequence[GeneratedToken] = ()) -> str:
        reason = tokens[-1].finish_reason if tokens else None
        choice = ChunkChoice(
            index=index,
            delta=delta,
            finish_reason=None if reason is None else _reason(reason),
            logprobs=self._logprobs(tokens) if tokens else None,
        )
        if self._body.return_token_ids:
            choice.token_ids = [token.token_id for token in tokens]
        if reason is not None:
            choice.stop_reason = self._job.requests[index].result().stop_reason
        chunk = ChatChunk(**self._head, choices=[choice], usage=self._running_usage())
        return chunk.model_dump_json()

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(content=[self._token(token) for token in tokens])

    def _token(self, token: GeneratedToken) -> ChatToken:
        chosen = self._candidate(token.token_id, token.logprob)
        heads = self._service.texts.heads(token.heads) if self._params.exit_details else None
        return ChatToken(
            token=chosen.token,
            logprob=chosen.logprob,
            bytes=chosen.bytes,
            top_logprobs=[self._candidate(*one) for one in token.top_logprobs],
            exit_layer=token.exit_layer,
            confidence=token.confidence,
            heads=heads,
        )

    def _candidate(self, token_id: int, logprob: float) -> Candidate:
        data = self._service.texts.bytes_of(token_id)
        return Candidate(
            token=self._service.texts.of(token_id),
            logprob=as_number(logprob),
            bytes=None if data is None else list(data),
        )


def _reason(reason: str) -> FinishReason:
    return "stop" if reason == "stop" else "length"
