"""The Flask application: endpoints, who may use them, and what every answer has."""

import hashlib
import hmac
import json
import logging
from collections import Counter
from typing import Any

from flask import Response, g, request
from flask.json.provider import DefaultJSONProvider
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from pydantic_core import from_json
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

from megatron.early_exit.server.engine_thread.job import ClientGone
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.http.cross_origin import allow_origins
from megatron.early_exit.server.http.errors import (
    ApiError,
    ErrorResponse,
    body_too_large,
    of_validation,
)
from megatron.early_exit.server.megatron_api.generate import generate
from megatron.early_exit.server.openai.chat import chat
from megatron.early_exit.server.openai.completions import completions
from megatron.early_exit.server.openai.models import models
from megatron.early_exit.server.openai.tokens import tokens
from megatron.early_exit.server.operations.browser import NAMES, add_docs, page
from megatron.early_exit.server.operations.health import operations
from megatron.early_exit.server.request_log import record
from megatron.early_exit.server.service import Service
from megatron.early_exit.server.settings import ServerSettings

_LOG = logging.getLogger(__name__)
_OPEN_TO_ALL = ("page.index", "page.static_file", "operations.health")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_DOCS_POLICY = "default-src 'self' data:; script-src 'self' 'unsafe-inline'; " + (
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; object-src 'none'"
)
"""The documentation's own page has its script in it."""
_GONE = 499
"""For the log: nobody reads this answer."""


class _StrictJson(DefaultJSONProvider):
    """JSON without what the standard does not have (NaN, Infinity), no deeper than the parser's
    limit, and without names that are given twice."""

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        try:
            found = from_json(s, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
        # The strict parser keeps the last of equal names and does not tell.
        json.loads(s, object_pairs_hook=_refuse_repeated_names)
        return found


def _refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"has the name {repeated[:80]!r} twice")
    return found


def _first_cause(error: BaseException) -> BaseException:
    """Flask and Werkzeug wrap what the parser says in sentences of their own."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error if cause is None else _first_cause(cause)


def create_app(worker: EngineWorker, settings: ServerSettings) -> OpenAPI:
    """The application, which serves a worker's engine as the operator has set it."""
    app = OpenAPI(
        __name__,
        info=Info(title="Early-exit text generation", version="1"),
        validation_error_status=400,
        validation_error_model=ErrorResponse,
        validation_error_callback=of_validation,
        security_schemes={"key": {"type": "http", "scheme": "bearer"}},
        doc_ui=False,
        static_folder=None,
    )
    app.json = _StrictJson(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    service = Service(worker, settings)
    for endpoints in (completions, chat, models, generate, tokens, operations):
        app.register_api(endpoints(service))
    app.register_blueprint(page())
    needs_key = settings.api_key is not None
    add_docs(app, needs_key)
    record(app, worker, settings)
    allow_origins(app, settings.allowed_origins)
    _guard(app, settings)
    _explain_errors(app)
    return app


def _guard(app: OpenAPI, settings: ServerSettings) -> None:
    expected = None if settings.api_key is None else _digest(settings.api_key)

    @app.before_request
    def check_key() -> None:
        if expected is None or request.endpoint in _OPEN_TO_ALL or request.blueprint in NAMES:
            return
        given = request.headers.get("Authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key), expected):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="key"
            )

    @app.before_request
    def check_body() -> None:
        if request.method in ("POST", "PUT") and request.url_rule is not None:
            try:
                g.body = request.get_json()
            except RequestEntityTooLarge as error:
                raise body_too_large(settings.max_body_bytes) from error
            except BadRequest as error:
                raise ApiError(400, f"the body {_first_cause(error)}") from error

    @app.after_request
    def add_headers(response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers[name] = value
        if request.path.startswith("/docs"):
            response.headers["Content-Security-Policy"] = _DOCS_POLICY
        if request.path != "/" and not request.path.startswith("/static/"):
            response.headers["Cache-Control"] = "no-store"
        return response


def _digest(key: str) -> bytes:
    """A digest of equal length for any key: comparing takes the same time for all."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _explain_errors(app: OpenAPI) -> None:
    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> Response:
        return error.response()

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        if error.code is None or error.response is not None:
            return app.make_response(error.get_response())
        response = ApiError(error.code, str(error.description)).response()
        for name, value in error.get_headers():
            if name in ("Allow", "Retry-After"):
                response.headers[name] = value
        return response

    @app.errorhandler(ClientGone)
    def client_gone(_: ClientGone) -> Response:
        return Response(status=_GONE)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _LOG.exception("a request could not be served")
        return ApiError(500, f"{type(error).__name__} in the server", code="internal").response()
