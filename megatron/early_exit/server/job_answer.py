"""What answers of all kinds are made of."""

import time
import uuid
from typing import Any

from flask import g

from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.server.chat_models import ChatRequest
from megatron.early_exit.server.completion_models import CompletionRequest
from megatron.early_exit.server.job import Job
from megatron.early_exit.server.request_metrics import request_metrics, usage
from megatron.early_exit.server.service import Service


class JobAnswer[Body: (CompletionRequest, ChatRequest)]:
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
        self._head: dict[str, Any] = {
            "id": f"{self.kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.model.name,
        }
        g.outcome |= {"id": self._head["id"], "model": self._head["model"][:200]}

    @property
    def _ends_with_figures(self) -> bool:
        """Whether the stream does."""
        options = self._body.stream_options
        return options is not None and options.include_usage

    def _figures(self) -> dict[str, Any]:
        """What the request has cost; all has ended."""
        results = self._job.results()
        return {
            "usage": usage(results, self._body.n),
            "metrics": request_metrics(results, self._params, self._service.num_layers),
        }
