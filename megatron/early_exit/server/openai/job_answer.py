"""What answers of all kinds are made of."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from flask import g

from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.server.bodies.answer_models import Usage
from megatron.early_exit.server.bodies.request_metrics import request_metrics, usage
from megatron.early_exit.server.bodies.stream_options import with_options
from megatron.early_exit.server.engine_thread.job import Job, Tokens
from megatron.early_exit.server.openai.chat_models import ChatRequest
from megatron.early_exit.server.openai.completion_models import CompletionRequest
from megatron.early_exit.server.service import Service


class JobAnswer[Body: (CompletionRequest, ChatRequest)](ABC):
    """The answer to one request, whole or in pieces.

    Args:
        body: the request.
        params: what it asks of the engine.
        service: knows the model.
        job: gets the tokens.
    """

    kind: str
    """What identifiers begin with."""

    def __init__(self, body: Body, params: SamplingParams, service: Service, job: Job) -> None:
        self._body: Body = body
        self._params, self._service, self._job = params, service, job
        self._num_given = 0
        self._head: dict[str, Any] = {
            "id": f"{self.kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.model.name,
        }
        g.outcome |= {"id": self._head["id"], "model": self._head["model"][:200]}

    def events(self, batches: Iterator[Tokens]) -> Iterator[str]:
        """The stream's events, for the tokens of the job as they come."""
        return with_options(self._events(self._counted(batches)), self._body.stream_options)

    @abstractmethod
    def _events(self, batches: Iterator[Tokens]) -> Iterator[str]:
        """The events, without what options add to the text of each."""

    def _counted(self, batches: Iterator[Tokens]) -> Iterator[Tokens]:
        for batch in batches:
            self._num_given += len(batch)
            yield batch

    def _running_usage(self) -> Usage | None:
        """The tokens until now, for each event of a stream that wants them; else None."""
        options = self._body.stream_options
        if options is None or not options.continuous_usage_stats:
            return None
        sequences = [request.sequence for request in self._job.requests[:: self._body.n]]
        prompts = sum(len(one.prompt) for one in sequences)
        return usage(prompts, self._num_given, sum(one.num_cached for one in sequences))

    @property
    def _ends_with_figures(self) -> bool:
        """Whether the stream does."""
        options = self._body.stream_options
        return options is not None and options.include_usage

    def _figures(self) -> dict[str, Any]:
        """What the request has cost; all has ended."""
        results = self._job.results()
        prompts = results[:: self._body.n]
        return {
            "usage": usage(
                sum(len(one.prompt_token_ids) for one in prompts),
                sum(len(one.token_ids) for one in results),
                sum(one.statistics.num_cached_tokens for one in prompts),
            ),
            "metrics": request_metrics(results, self._params, self._service.num_layers),
        }
