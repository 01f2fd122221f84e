"""What the events of a stream have besides the text."""

import secrets
from collections.abc import Iterator
from typing import Protocol

from pydantic import Field

from megatron.early_exit.server.bodies.fields import RequestModel
from megatron.early_exit.server.http.errors import ApiError

_BLOCK = 64
"""Events are filled up to multiples of so many bytes."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
"""Some clients end the lines of a stream at these, too; in JSON they may as well be escaped."""


class StreamOptions(RequestModel):
    """What the events of a stream have besides the text."""

    include_usage: bool = Field(False, description="End with an event that has the figures.")
    continuous_usage_stats: bool = Field(
        False, description="Each event has the number of tokens until then."
    )
    include_obfuscation: bool = Field(
        False,
        description="Fill events up with random characters, so that their lengths do not tell on "
        "the network how long the tokens are.",
    )


class _Streamable(Protocol):
    stream: bool
    stream_options: StreamOptions | None


def check_stream_options(body: _Streamable) -> None:
    """Refuse options of a stream where there is none.

    Raises:
        ApiError: the request has options, and does not ask for a stream.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: has no effect without stream", "stream_options")


def with_options(events: Iterator[str], options: StreamOptions | None) -> Iterator[str]:
    """The events of a stream, JSON objects, as its options want them, each on one line."""
    lines = (event.translate(_LINE_ENDS) for event in events)
    if options is None or not options.include_obfuscation:
        return lines
    return map(_filled_up, lines)


def _filled_up(event: str) -> str:
    begin = f'{event[:-1]},"obfuscation":"'
    missing = -(len(begin.encode()) + 2) % _BLOCK
    return f'{begin}{secrets.token_urlsafe(_BLOCK)[:missing]}"}}'
