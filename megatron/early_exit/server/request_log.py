"""A line of the log for each request: enough to find out what a client complains of."""

import logging
import re
import uuid
from collections import Counter
from time import perf_counter

from flask import Flask, Response, g, request

from megatron.early_exit.server.engine_thread.job import Job
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.http.client_address import client_address
from megatron.early_exit.server.http.logs import log
from megatron.early_exit.server.settings import ServerSettings

REQUEST_ID = "X-Request-Id"
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LONGEST_NAME = 200
_LOG = logging.getLogger(__name__)


def record(app: Flask, worker: EngineWorker, settings: ServerSettings) -> None:
    """Count each request, give it an identifier, and log it when its answer is out."""

    @app.before_request
    def note_begin() -> None:
        g.begin, g.body, g.outcome = perf_counter(), None, {}
        given = request.headers.get(REQUEST_ID, "")
        # What is not fit for a line and a header is not taken over.
        g.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex

    @app.after_request
    def log_end(response: Response) -> Response:
        worker.metrics.answered(response.status_code)
        response.headers[REQUEST_ID] = g.request_id
        forwarded = ",".join(request.headers.getlist("X-Forwarded-For"))
        fields: dict[str, object] = {
            "request_id": g.request_id,
            "method": request.method,
            "path": request.path,
            "status": response.status_code,
            "client": client_address(request.remote_addr, forwarded, settings.trusted_proxies),
        }
        model = g.body.get("model") if isinstance(g.body, dict) else None
        if isinstance(model, str):
            fields["model"] = model[:_LONGEST_NAME]
        if settings.log_prompts and not _wants_no_log(g.body):
            fields["body"] = g.body
        begin, outcome = g.begin, g.outcome

        def write() -> None:
            seconds = round(perf_counter() - begin, 4)
            log(_LOG, "request", **(fields | outcome), seconds=seconds)

        response.call_on_close(write)
        return response


def note_end(outcome: dict[str, object], job: Job) -> None:
    """Put how a job has gone into the line of its request."""
    outcome["completion_tokens"] = job.num_tokens
    reasons = Counter(one.finish_reason or "cancelled" for one in job.requests)
    outcome["finish_reasons"] = dict(reasons)
    times = [one.seconds_to_first_token for one in job.requests if one.tokens]
    if times:
        outcome["first_token_seconds"] = round(min(times), 4)


def _wants_no_log(body: object) -> bool:
    """Whether the request asks, as Megatron's clients can, that its prompt is not logged."""
    return isinstance(body, dict) and body.get("no_log") is True
