"""What a client is told when its request cannot be served."""

from typing import Literal

from flask import Response, current_app
from flask_openapi3.types import ResponseDict
from pydantic import BaseModel, ValidationError

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
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_LONGEST_VALUE = 80


class ErrorBody(BaseModel):
    """One error, as OpenAI's clients read it."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody


ERRORS: ResponseDict = dict.fromkeys(
    (400, 401, 404, 405, 413, 415, 429, 500, 503, 504), ErrorResponse
)
"""What any endpoint may answer, for the OpenAPI document."""


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
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = ErrorResponse(
            error=ErrorBody(message=message, type=kind, param=param, code=code)
        )

    def response(self) -> Response:
        """The HTTP response."""
        response = current_app.response_class(
            self.body.model_dump_json(), self.status, mimetype="application/json"
        )
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(self.retry_after)
        return response


def of_field(error: ValueError, param: str | None = None) -> ApiError:
    """The answer to a value that is refused with a sentence that begins with the field's name.

    Args:
        param: the field at fault, where the sentence does not begin with it.
    """
    name = str(error).partition(" ")[0].rstrip(":")
    return ApiError(400, str(error), param or (name if name.isidentifier() else None))


def of_validation(error: ValidationError) -> Response:
    """The answer to a body that is not what the endpoint takes."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    given = first.get("input")
    if not place:
        message = "the body has to be a JSON object"
    elif first["type"] == "missing":
        message = f"{place}: is required"
    elif first["type"] == "extra_forbidden":
        message = f"{place}: is unknown here"
    else:
        value = repr(given)
        if len(value) > _LONGEST_VALUE:
            value = value[:_LONGEST_VALUE] + "..."
        message = f"{place} {value}: {first['msg']}"
    name = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, message, name).response()
