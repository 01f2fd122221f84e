"""From tokens to the bodies of `/v1/chat/completions`."""

import time
import uuid
from collections.abc import Iterator, Sequence

from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.server.answer_models import FinishReason
from megatron.early_exit.server.chat_models import (
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
from megatron.early_exit.server.job import Job, Tokens
from megatron.early_exit.server.request_metrics import request_metrics, usage
from megatron.early_exit.server.service import Service
from megatron.early_exit.server.token_texts import as_number


class ChatAnswer:
    """The answer to one request, whole or in pieces.

    Args:
        body: the request.
        params: what it asks of the engine.
        service: knows the model.
        job: gets the tokens.
    """

    def __init__(
        self, body: ChatRequest, params: SamplingParams, service: Service, job: Job
    ) -> None:
        self._body, self._params, self._service, self._job = body, params, service, job
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._name = body.model or service.model.name

    def whole(self) -> ChatResponse:
        """The body, when all has ended."""
        results = self._job.results()
        choices = [
            ChatChoice(
                index=index,
                message=Answer(content=result.text or ""),
                finish_reason=_reason(result.finish_reason),
                stop_reason=result.stop_reason,
                logprobs=self._logprobs(self._job.requests[index].tokens),
                token_ids=result.token_ids if self._body.return_token_ids else None,
            )
            for index, result in enumerate(results)
        ]
        return ChatResponse(
            id=self._id,
            created=self._created,
            model=self._name,
            choices=choices,
            usage=usage(results, self._body.n),
            metrics=request_metrics(results, self._params, self._service.num_layers),
        )

    def events(self, batches: Iterator[Tokens]) -> Iterator[str]:
        """The stream's events."""
        for index in range(self._job.size):
            yield self._event(index, Delta(role="assistant", content=""))
        for batch in batches:
            pieces: dict[int, list[GeneratedToken]] = {}
            for index, token in batch:
                pieces.setdefault(index, []).append(token)
            for index, tokens in pieces.items():
                text = "".join(token.text or "" for token in tokens)
                yield self._event(index, Delta(content=text), tokens)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            results = self._job.results()
            last = self._chunk([])
            last.usage = usage(results, self._body.n)
            last.metrics = request_metrics(results, self._params, self._service.num_layers)
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
        return self._chunk([choice]).model_dump_json()

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._name, choices=choices)

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
        text = self._service.texts.of(token_id)
        is_whole = "\ufffd" not in text
        return Candidate(
            token=text,
            logprob=as_number(logprob),
            bytes=list(text.encode()) if is_whole else None,
        )


def _reason(reason: str) -> FinishReason:
    return "stop" if reason == "stop" else "length"
