"""Many HTTP clients in one thread, which parse no answer before the load has ended."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

from serve_requests import Item

PATIENCE_S = 120.0
"""A request that takes longer counts as lost."""
_STREAMED = b', "stream": true, "return_token_ids": true}'


@dataclass
class Record:
    """The result of one item.

    Attributes:
        item: the request.
        status: the HTTP status; 0 if there was none.
        begin: when the request was sent.
        times: when each part of the answer arrived.
        parts: the parts of the answer.
    """

    item: Item
    status: int = 0
    begin: float = 0.0
    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)

    @property
    def is_cancelled(self) -> bool:
        """Whether the client has disconnected as planned."""
        return len(self.parts) == self.item.cancel_after

    def events(self) -> list[dict[str, Any]]:
        """The events of the stream, without the one that marks its end."""
        whole = b"".join(self.parts).decode()
        lines = [line.removeprefix("data: ") for line in whole.split("\n\n") if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def is_right(self) -> bool:
        """Whether the answer equals that which the question gets alone, up to where the client
        left."""
        question = self.item.question
        if self.status != 200:
            return False
        if not self.item.is_streamed:
            return question.accepts(json.loads(b"".join(self.parts))["choices"])
        events = self.events()
        if any("error" in event for event in events):
            return False
        texts = [""] * question.n
        for event in events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        if self.is_cancelled:
            return all(question.answer.startswith(text) for text in texts)
        is_whole = self.parts[-1].endswith(b"data: [DONE]\n\n")
        return is_whole and question.accepts([{"text": text} for text in texts])

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the client has received."""
        if self.is_cancelled:
            return sum(len(event["choices"][0]["token_ids"]) for event in self.events())
        return self.item.question.params.max_tokens

    def as_answered(self) -> Item:
        """The item for an engine, whose client leaves after a number of tokens instead of
        events."""
        return replace(self.item, cancel_after=self.num_tokens if self.is_cancelled else None)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with tokens."""
        ends = [*self.times] if self.is_cancelled else self.times[:-1]
        return [end - begin for begin, end in pairwise(ends)]


class Client:
    """One connection, which is opened again when it has been closed.

    Args:
        host: of the server.
        port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        self._head += "Content-Type: application/json\r\nContent-Length: "
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def work(self, items: Iterator[Item], until: float, records: list[Record]) -> None:
        """Send one item after the other, until a time of `perf_counter`."""
        while perf_counter() < until:
            record = Record(next(items))
            records.append(record)
            await self.ask(record)
        self.close()

    async def ask(self, record: Record) -> None:
        """Send one request and fill its record with the answer."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._ask(record)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            record.status = 0
            self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._pair is not None:
            self._pair[1].close()
            self._pair = None

    async def _ask(self, record: Record) -> None:
        body = record.item.question.body
        if record.item.is_streamed:
            body = body[:-1] + _STREAMED
        record.begin = perf_counter()
        if self._pair is None:
            self._pair = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._pair
        writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        record.status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" not in head:
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self._add(record, await reader.readexactly(length))
            return
        # Its server closes behind each such answer.
        while size := int(await reader.readline(), 16):
            self._add(record, (await reader.readexactly(size + 2))[:-2])
            if record.is_cancelled:
                break
        self.close()

    @staticmethod
    def _add(record: Record, part: bytes) -> None:
        record.times.append(perf_counter())
        record.parts.append(part)


async def load(
    host: str, port: int, items: Iterator[Item], num_clients: int, seconds: float
) -> tuple[list[Record], float]:
    """Let clients send requests for some time, and wait for the answers to all of them.

    Returns:
        The records in the order of the requests, and the seconds that it took.
    """
    records: list[Record] = []
    begin = perf_counter()
    until = begin + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(Client(host, port).work(items, until, records))
    return records, perf_counter() - begin
