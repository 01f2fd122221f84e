"""HTTP request parser: waitress', with checks against request smuggling, and bounded bodies."""

import re
import time
from typing import Any

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.utilities import BadRequest

_LONGEST_CHUNK_LINE = 1024
_LONGEST_TRAILER = 2**14
_HOST = re.compile(rb"[\x21-\x7e]*")


class _CappedBuffer(OverflowableBuffer):  # type: ignore[misc]
    """Keeps the first `most` bytes of a body, and forgets the rest."""

    def __init__(self, overflow: int, most: int) -> None:
        super().__init__(overflow)
        self._most = most

    def append(self, data: bytes) -> None:
        room = self._most - len(self)
        if room > 0:
            super().append(data[:room])


class RequestParser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a request.

    What two programs on the way could understand as different requests (RFC 9112, sections 5.2, 6.1
    and 6.3) is refused, and the connection is closed. A body that is too large is read to its end,
    so that the client gets an answer, but not kept.

    Args:
        adj: waitress' settings; `kept_body_bytes` is what is kept of a body.

    Attributes:
        began: when its first byte came, by `time.time`.
    """

    error: Any

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.time()

    def parse_header(self, header_plus: bytes) -> None:
        """Read the first line and the headers.

        Raises:
            ParsingError: they are not what they should be.
        """
        super().parse_header(header_plus)
        fields = _fields(header_plus)
        lengths = fields.get(b"content-length", [])
        encodings = fields.get(b"transfer-encoding", [])
        if encodings:
            if lengths:
                raise ParsingError("Transfer-Encoding and Content-Length exclude each other")
            if self.version != "1.1":
                raise ParsingError("Transfer-Encoding needs HTTP/1.1")
            if [one.lower() for one in encodings] != [b"chunked"]:
                raise ParsingError("Transfer-Encoding is invalid, allowed: chunked")
        if len(lengths) > 1:
            raise ParsingError("Content-Length is there more than once")
        hosts = fields.get(b"host", [])
        if len(hosts) > 1 or (self.version == "1.1" and not hosts):
            raise ParsingError("Host has to be there once")
        if not all(_HOST.fullmatch(one) for one in hosts):
            raise ParsingError("Host is invalid")
        if self.body_rcv is not None:
            self.body_rcv.buf = _CappedBuffer(self.adj.inbuf_overflow, self.adj.kept_body_bytes)

    def received(self, data: bytes) -> int:
        """Take bytes in; returns how many of them belong to this request."""
        consumed: int = super().received(data)
        if self.error is not None:
            # Waitress would ask for the body first, and answer after it.
            self.expect_continue = False
        body = self.body_rcv
        if isinstance(body, ChunkedReceiver) and self.error is None:
            line, trailer = len(body.control_line), len(body.trailer)
            if line > _LONGEST_CHUNK_LINE or trailer > _LONGEST_TRAILER:
                self.error = BadRequest("a chunk's size or the trailer is too long")
                self.completed = True
        return consumed


def _fields(header_plus: bytes) -> dict[bytes, list[bytes]]:
    """The values of each header, by its name in small letters.

    Raises:
        ParsingError: one is folded over several lines.
    """
    found: dict[bytes, list[bytes]] = {}
    for line in header_plus.split(b"\r\n")[1:]:
        if line[:1] in (b" ", b"\t"):
            raise ParsingError("a header is folded over several lines")
        name, _, value = line.partition(b":")
        found.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return found
