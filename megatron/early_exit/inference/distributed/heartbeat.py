"""Notices that another process of the engine has died or hangs, and ends this one, too."""

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed

from megatron.early_exit.inference.distributed.control import exchange, own_address

INTERVAL_S = 0.2
SILENCE_S = 8.0
"""How long a process may be silent whose connection is open. Starved of its core it may be for
seconds."""
LEAVING_S = 5.0
"""How long a process that leaves waits for the others, and one that works for one that has left."""
LAST_WORDS_S = 2.0
"""How long a process that ends takes at most to tell others why."""
_ALIVE, _LEAVING = "", "leaving"
"""Words are lines. Any other one is the reason for which its sender ends: what came first, so that
no process blames one that has only told it of another's death."""


class Heartbeat:
    """A thread that tells the others that this process lives, and listens to them.

    Where one falls silent or its connection closes, nothing that waits for it would ever end. So
    this process is ended at once, with a sentence and the status 1, whatever it waits for.

    Args:
        group: all processes of the engine; they must create it together.

    Attributes:
        on_death: told the sentence by the thread before this process is ended, which comes after
            `LAST_WORDS_S` whatever it does.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self._rank = distributed.get_rank(group)
        self._peers = _connect(self._rank, group)
        now = time.monotonic()
        self._deadlines = dict.fromkeys(self._peers.values(), now + SILENCE_S)
        self._half_read = dict.fromkeys(self._peers.values(), b"")
        self._left: dict[int, float] = {}
        self._work_began: float | None = None
        self.on_death: Callable[[str], None] | None = None
        self._ends = threading.Event()
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The context in which this process needs all others to be alive."""
        self._work_began = time.monotonic()
        try:
            yield
        except RuntimeError:
            # When the thread finds that a death explains it, it ends the process with a sentence.
            if self._ends.wait(8 * INTERVAL_S):
                self._thread.join()
            raise
        finally:
            self._work_began = None

    def close(self) -> None:
        """Leave in good order: wait until all others leave, too, or their time for that is over."""
        self._leaves.set()
        self._thread.join(LEAVING_S)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            began = time.monotonic()
            while len(self._left) < len(self._peers) or not self._leaves.is_set():
                self._say(_LEAVING if self._leaves.is_set() else _ALIVE)
                self._listen(selector)
                now = time.monotonic()
                # While this one was starved itself, it did not hear the others.
                starved_s = max(0.0, now - began - INTERVAL_S)
                for rank in self._deadlines:
                    self._deadlines[rank] += starved_s
                if not self._leaves.is_set():
                    self._judge(now)
                began = now
        self._say(_LEAVING)
        for peer in self._peers:
            peer.close()

    def _say(self, word: str) -> None:
        for peer, rank in self._peers.items():
            try:
                peer.send(f"{word}\n".encode())
            except OSError:
                # Closed, which `_listen` finds out as well, or full of what it does not read.
                self._deadlines[rank] = min(self._deadlines[rank], time.monotonic() + SILENCE_S)

    def _listen(self, selector: selectors.BaseSelector) -> None:
        until = time.monotonic() + (INTERVAL_S / 10 if self._leaves.is_set() else INTERVAL_S)
        while ready := selector.select(max(0.0, until - time.monotonic())):
            for key, _ in ready:
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                rank = self._peers[peer]
                try:
                    data = peer.recv(4096)
                except OSError:
                    data = b""
                if data:
                    self._hear(rank, data)
                    continue
                selector.unregister(peer)
                if self._leaves.is_set():
                    self._left.setdefault(rank, time.monotonic())
                elif rank not in self._left:
                    self._end(f"rank {rank} of the inference engine has died")

    def _hear(self, rank: int, data: bytes) -> None:
        self._deadlines[rank] = time.monotonic() + SILENCE_S
        *words, self._half_read[rank] = (self._half_read[rank] + data).split(b"\n")
        for word in map(bytes.decode, words):
            if word == _LEAVING:
                self._left.setdefault(rank, time.monotonic())
            elif word != _ALIVE and not self._leaves.is_set():
                self._end(word)

    def _judge(self, now: float) -> None:
        for rank, deadline in self._deadlines.items():
            if now > deadline and rank not in self._left:
                self._end(f"rank {rank} of the inference engine hangs")
        began = self._work_began
        for rank, left in self._left.items():
            if began is not None and now > max(began, left) + LEAVING_S:
                self._end(f"rank {rank} has left the inference engine while others work")

    def _end(self, reason: str) -> None:
        self._ends.set()
        self._say(reason)
        sentence = f"{reason}, so rank {self._rank} ends, too"
        sys.stdout.flush()
        sys.stderr.write(f"error: {sentence}\n")
        sys.stderr.flush()
        try:
            if self.on_death is not None:
                threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()
                self.on_death(sentence)
        finally:
            os._exit(1)


def _connect(rank: int, group: distributed.ProcessGroup) -> dict[socket.socket, int]:
    """A connection to every other rank of the group."""
    with socket.create_server((own_address(), 0), backlog=1024) as server:
        host, port = server.getsockname()
        endpoints = exchange(f"{host}:{port}", group)
        peers = {}
        for other, endpoint in enumerate(endpoints[:rank]):
            host, _, number = endpoint.rpartition(":")
            peer = socket.create_connection((host, int(number)))
            peer.sendall(rank.to_bytes(4))
            peers[peer] = other
        while len(peers) < len(endpoints) - 1:
            peer = server.accept()[0]
            peers[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL))
    for peer in peers:
        # Last words are on their way when this process ends.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setblocking(False)
    return peers
