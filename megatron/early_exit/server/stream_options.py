"""What a stream ends with."""

from typing import Protocol

from megatron.early_exit.server.errors import ApiError
from megatron.early_exit.server.fields import RequestModel


class StreamOptions(RequestModel):
    """What a stream ends with."""

    include_usage: bool = False


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
