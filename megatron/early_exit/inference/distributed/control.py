"""Small messages between the processes of an engine, over ZeroMQ.

What a message says is JSON, logits that go with it are raw bytes: nothing that arrives is ever
executed.
"""

import json
import os
import socket
from typing import Any

import zmq
from torch import distributed

Message = dict[str, Any]


class ControlPlane:
    """One inbox for each process, and a line from every process to every inbox.

    All processes of the group must create it together; their addresses are exchanged over the
    group. Messages from the same sender arrive in their order.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.context = zmq.Context()
        self._inbox = self.context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"tcp://{own_address()}:*")
        endpoint = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._lines = []
        for address in exchange(endpoint, group):
            line = self.context.socket(zmq.PUSH)
            line.set_hwm(0)
            line.connect(address)
            self._lines.append(line)

    def send(self, rank: int, message: Message, attachment: bytes | None = None) -> None:
        """Send without waiting for anything."""
        frames = [json.dumps(message).encode()]
        self._lines[rank].send_multipart(frames if attachment is None else [*frames, attachment])

    def receive(self, wait: bool = True) -> tuple[Message, bytes | None] | None:
        """The next message, and what is attached to it; None where none has come: by default it
        waits for one."""
        if not self._inbox.poll(None if wait else 0):
            return None
        frames = self._inbox.recv_multipart()
        return json.loads(frames[0]), frames[1] if len(frames) > 1 else None

    def close(self) -> None:
        """Close the connections; every message that matters has arrived by now."""
        for ends in (self._inbox, *self._lines):
            ends.close(linger=0)
        self.context.term()


def own_address() -> str:
    """The address under which the other processes see this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: this asks for the way to the first rank.
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])


def exchange(endpoint: str, group: distributed.ProcessGroup) -> list[str]:
    """The endpoints of all ranks of a group."""
    endpoints = [""] * distributed.get_world_size(group)
    distributed.all_gather_object(endpoints, endpoint, group=group)
    return endpoints
