"""Notices that another process of the engine has died or hangs, and ends this one, too."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
from torch import distributed
from zmq.utils.monitor import recv_monitor_message

from megatron.early_exit.inference.control import bind, exchange

INTERVAL_S = 0.2
SILENCE_S = 8.0
"""How long a process may be silent. Starved of its core it may be for seconds."""
GRACE_S = 1.0
"""How long it may be silent after its connection broke."""
LEAVING_S = 5.0
"""How long a process that leaves waits for the others, and one that works for one that has left."""
_LINGER_MS = 200
_ALIVE, _LEAVING = b"alive", b"leaving"


class Heartbeat:
    """A thread that tells the others that this process lives, and listens to them.

    Where one falls silent, nothing that waits for it would ever end. So the process is ended at
    once, with a sentence and the status 1, whatever it waits for.

    Args:
        group: all processes of the engine; they must create it together.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self._rank = distributed.get_rank(group)
        self._context = zmq.Context()
        self._mouth = self._context.socket(zmq.PUB)
        self._ear = self._context.socket(zmq.SUB)
        self._ear.subscribe(b"")
        self._monitor = self._ear.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._endpoints = exchange(bind(self._mouth), group)
        now = time.monotonic()
        self._deadlines: dict[int, float] = {}
        self._left: dict[int, float] = {}
        self._work_began: float | None = None
        for rank, endpoint in enumerate(self._endpoints):
            if rank != self._rank:
                self._ear.connect(endpoint)
                self._deadlines[rank] = now + SILENCE_S
        self._leaves = threading.Event()
        self._all_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While this lasts, this process needs all of the others."""
        self._work_began = time.monotonic()
        try:
            yield
        except (RuntimeError, zmq.ZMQError):
            # When the thread finds that a death explains it, it ends the process with a sentence.
            time.sleep(GRACE_S + 4 * INTERVAL_S)
            raise
        finally:
            self._work_began = None

    def close(self) -> None:
        """Leave in good order: once all others leave, too, or have been given time to."""
        if not self._leaves.is_set():
            self._leaves.set()
            self._all_left.wait(LEAVING_S)
            self._all_left.set()
            self._thread.join()
            self._context.term()

    def _run(self) -> None:
        own = str(self._rank).encode()
        began = time.monotonic()
        while not self._all_left.is_set():
            self._mouth.send_multipart([own, _LEAVING if self._leaves.is_set() else _ALIVE])
            if len(self._left) == len(self._endpoints) - 1 and self._leaves.is_set():
                break
            self._listen()
            now = time.monotonic()
            # One that was starved itself must not judge the others.
            if now - began < 5 * INTERVAL_S:
                self._judge(now)
            began = now
        self._all_left.set()
        self._ear.disable_monitor()
        self._monitor.close(linger=0)
        self._ear.close(linger=0)
        self._mouth.close(linger=_LINGER_MS)

    def _listen(self) -> None:
        poller = zmq.Poller()
        poller.register(self._ear, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        until = time.monotonic() + INTERVAL_S
        while ready := dict(poller.poll(max(0, int(1000 * (until - time.monotonic()))))):
            now = time.monotonic()
            if self._ear in ready:
                sender, word = self._ear.recv_multipart()
                self._heard(int(sender), word, now)
            if self._monitor in ready:
                endpoint = recv_monitor_message(self._monitor)["endpoint"].decode()
                rank = self._endpoints.index(endpoint)
                if rank in self._deadlines:
                    self._deadlines[rank] = min(self._deadlines[rank], now + GRACE_S)

    def _heard(self, rank: int, word: bytes, now: float) -> None:
        if word == _LEAVING:
            self._deadlines.pop(rank, None)
            self._left.setdefault(rank, now)
        elif rank in self._deadlines:
            self._deadlines[rank] = now + SILENCE_S

    def _judge(self, now: float) -> None:
        for rank, deadline in self._deadlines.items():
            if now > deadline:
                self._end(f"rank {rank} of the inference engine has died or hangs")
        began = self._work_began
        for rank, left in self._left.items():
            if began is not None and now > max(began, left) + LEAVING_S:
                self._end(f"rank {rank} has left the inference engine while others work")

    def _end(self, reason: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"error: {reason}, so rank {self._rank} ends, too\n")
        sys.stderr.flush()
        os._exit(1)
