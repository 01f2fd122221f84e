"""What a stream ends with."""

from typing import Protocol

from pydantic import Field

from megatron.early_exit.server.errors import ApiError
from megatron.early_exit.server.fields import RequestModel
from megatron.early_exit.server.unsupported import STREAM_OPTIONS


class StreamOptions(RequestModel):
    """What a stream ends with."""

    unsupported = STREAM_OPTIONS
    within = "stream_options"

    include_usage: bool = False
    include_obfuscation: bool | None = Field(
        None, description="Nothing is ever added to events here."
    )


class _Streamable(Protocol):
    stream: bool
    stream_options: StreamOptions | None


def check_stream_options(body: _Streamable) -> None:
    """Refuse options of a stream where there is none.

    Raises:
        ApiError: there is none.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: has no effect without stream", "stream_options")
