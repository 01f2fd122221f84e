"""The errors that a client gets when its request cannot be served."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from flask import Response, current_app, g, request
from flask_openapi3.types import ResponseDict
from pydantic import BaseModel, ValidationError

from megatron.early_exit.errors import FieldError

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
]
_TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_LONGEST_VALUE = 80
_LONGEST_REASON = 300


class ErrorBody(BaseModel):
    """One error, as OpenAI's clients read it."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody


class GenerateErrorResponse(ErrorResponse):
    """The same with what Megatron's clients read."""

    message: str


_STATUSES = (400, 401, 404, 405, 413, 415, 429, 500, 503, 504)
ERRORS: ResponseDict = dict.fromkeys(_STATUSES, ErrorResponse)
"""What any endpoint may answer, for the OpenAPI document."""
GENERATE_PATH = "/api"
GENERATE_ERRORS: ResponseDict = dict.fromkeys(_STATUSES, GenerateErrorResponse)
"""What `GENERATE_PATH` may answer."""


class ApiError(Exception):
    """A request that cannot be served.

    Args:
        status: of the HTTP response.
        message: for the user.
        param: the field at fault.
        code: names the error for programs.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.logged = message
        """The same without what users write."""
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error = ErrorBody(message=message, type=kind, param=param, code=code)
        self.body = ErrorResponse(error=error)

    def note(self) -> None:
        """Put the reason of the refusal into the request's line of the log."""
        g.outcome["reason"] = self.logged[:_LONGEST_REASON]
        if self.body.error.code is not None:
            g.outcome["code"] = self.body.error.code

    def response(self) -> Response:
        """The HTTP response."""
        self.note()
        body = self.body
        if request.path == GENERATE_PATH:
            body = GenerateErrorResponse(error=body.error, message=body.error.message)
        text = body.model_dump_json()
        response = current_app.response_class(text, self.status, mimetype="application/json")
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def body_too_large(most: int) -> ApiError:
    """The answer to a body of more than `most` bytes."""
    return ApiError(413, f"body: is too large, allowed: up to {most} bytes", "body")


def engine_error(reason: str) -> ApiError:
    """The answer to a request that the engine could not bring to its end; others go on."""
    return ApiError(500, f"there is no whole answer: {reason}", code="engine_error")


def of_field(error: FieldError, names: Mapping[str, str] | None = None) -> ApiError:
    """The answer to a value that the engine refuses.

    Args:
        names: what the request calls the engine's fields, where that is something else.
    """
    given = (names or {}).get(error.field, error.field)
    return ApiError(400, error.named(given), given)


def of_validation(error: ValidationError) -> Response:
    """The answer to a body that is not what the endpoint takes."""
    first = error.errors(include_url=False, include_context=False)[0]
    body = request.get_json(silent=True)
    place = _place(first["loc"], body)
    logged = None
    if not first["loc"]:
        message = "the body has to be a JSON object"
    elif first["type"] == "missing":
        message = f"{place}: is required"
    elif first["type"] == "extra_forbidden":
        message = f"{place}: is unknown here"
    else:
        value = json.dumps(first.get("input"), ensure_ascii=False)
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{place} {_shortened(value)}: {reason}"
        logged = f"{place}: {reason}"
    name = _shortened(str(first["loc"][0])) if first["loc"] else None
    refusal = ApiError(400, message, name)
    refusal.logged = logged or message
    return refusal.response()


def _place(parts: Sequence[str | int], body: object) -> str:
    """Where in a body a fault is, without what pydantic adds of its own: the kinds it has tried."""
    found = []
    for number, part in enumerate(parts):
        if isinstance(body, dict) and (part in body or number == len(parts) - 1):
            found.append(_shortened(str(part)))
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            found.append(str(part))
            body = body[part] if part < len(body) else None
    return ".".join(found)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
