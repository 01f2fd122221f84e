"""Gives transfers over gloo the behaviour of NCCL's, as far as it can stop a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed

from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.speed import patient

TIMEOUT = timedelta(seconds=patient(20))
_JOINING = 1
"""The tag of what is sent while a communicator is built."""


class Transfer:
    """A send or receive, which may be waited for more than once."""

    def __init__(self, work: distributed.Work) -> None:
        self._work, self._has_ended = work, False

    def is_completed(self) -> bool:
        return self._has_ended

    def wait(self) -> None:
        if not self._has_ended:
            self._work.wait(TIMEOUT)
            self._has_ended = True


class NcclTransfers:
    """The transfers of this process while `used`.

    The first one with a peer in a group stops the process until the peer takes part, since it
    builds their communicator. Gloo's sends themselves only end when they are received.

    Args:
        blocking: every send stops the process until it is received.
        synchronizing: this process waits for all transfers before each pass through a segment, as
            an allocator that gives memory back and a captured graph do.

    Attributes:
        communicators: pairs of a group's name and a peer that have been used, in their order.
    """

    def __init__(self, blocking: bool = False, synchronizing: bool = False) -> None:
        self._blocking, self._synchronizing = blocking, synchronizing
        self._send, self._receive = distributed.isend, distributed.irecv
        self._transfers: list[Transfer] = []
        self.communicators: list[tuple[str, int]] = []

    @contextmanager
    def used(self) -> Iterator[NcclTransfers]:
        run = SegmentRunner.run

        def run_synchronized(runner: SegmentRunner, *args: Any, **fields: Any) -> Tensor:
            self.synchronize()
            return run(runner, *args, **fields)

        with (
            patch.object(distributed, "isend", self.isend),
            patch.object(distributed, "irecv", self.irecv),
            patch.object(SegmentRunner, "run", run_synchronized if self._synchronizing else run),
        ):
            yield self

    def isend(self, tensor: Tensor, dst: int, group: distributed.ProcessGroup) -> Transfer:
        self._join(dst, group)
        transfer = self._started(self._send(tensor, dst, group=group))
        if self._blocking:
            transfer.wait()
        return transfer

    def irecv(self, tensor: Tensor, src: int, group: distributed.ProcessGroup) -> Transfer:
        self._join(src, group)
        return self._started(self._receive(tensor, src, group=group))

    def synchronize(self) -> None:
        """Wait for all transfers."""
        for transfer in self._transfers:
            transfer.wait()
        self._transfers.clear()

    def _started(self, work: distributed.Work | None) -> Transfer:
        assert work is not None
        self._transfers = [one for one in self._transfers if not one.is_completed()]
        self._transfers.append(Transfer(work))
        return self._transfers[-1]

    def _join(self, peer: int, group: distributed.ProcessGroup) -> None:
        if (group.group_name, peer) in self.communicators:
            return
        self.communicators.append((group.group_name, peer))
        works = [
            self._send(torch.zeros(1), peer, group=group, tag=_JOINING),
            self._receive(torch.zeros(1), peer, group=group, tag=_JOINING),
        ]
        for work in works:
            assert work is not None
            work.wait(TIMEOUT)
