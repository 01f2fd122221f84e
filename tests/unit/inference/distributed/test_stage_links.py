"""Neighbouring stages find each other, however many there are, and keep no more than they need."""

from __future__ import annotations

import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import local
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed

from megatron.early_exit.inference.distributed.process_groups import RankInfo
from megatron.early_exit.inference.distributed.stage_links import MAX_SENDS, StageLinks
from megatron.early_exit.inference.model.tensor_parallel import TensorParallel
from tests.helpers.speed import patient

TIMEOUT_S = patient(20)
H = 3


class Received:
    """A posted receive of `Wires`."""

    def __init__(self, tensor: Tensor, sent: Queue) -> None:
        self._tensor, self._sent = tensor, sent

    def wait(self) -> None:
        self._tensor.copy_(self._sent.get(timeout=TIMEOUT_S))


class Sent:
    """A send of `Wires` that does not tell whether it has ended."""

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        return


class Wires:
    """Transfers between ranks that are threads; a send stops its rank until it is expected.

    Attributes:
        own: of a thread, its `rank`.
        groups: that were used with each neighbour of each rank.
    """

    def __init__(self) -> None:
        self.own = local()
        self.groups: dict[tuple[int, int], set[int]] = defaultdict(set)
        self._expected: dict[tuple[int, int], Queue[None]] = defaultdict(Queue)
        self._sent: dict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)

    def isend(self, tensor: Tensor, dst: int, group: distributed.ProcessGroup) -> Sent:
        way = self.own.rank, dst
        self.groups[way].add(id(group))
        self._sent[way].put(tensor.clone())
        self._expected[way].get(timeout=TIMEOUT_S)
        return Sent()

    def irecv(self, tensor: Tensor, src: int, group: distributed.ProcessGroup) -> Received:
        self.groups[self.own.rank, src].add(id(group))
        self._expected[src, self.own.rank].put(None)
        return Received(tensor, self._sent[src, self.own.rank])


def rank_info(rank: int, num_stages: int, stage_size: int, group) -> RankInfo:
    stage, own = divmod(rank, stage_size)
    tensor = None if stage_size == 1 else TensorParallel(group, own, stage_size)
    return RankInfo(rank, num_stages * stage_size, stage, num_stages, tensor, group)


@pytest.mark.parametrize("stage_size", [1, 2])
@pytest.mark.parametrize("num_stages", [2, 3, 4, 7])
def test_neighbours_meet_although_sends_block(num_stages, stage_size):
    wires, size = Wires(), num_stages * stage_size
    whole, other = distributed.ProcessGroup(0, size), distributed.ProcessGroup(0, size)

    def run(rank: int) -> Tensor | None:
        wires.own.rank = rank
        info = rank_info(rank, num_stages, stage_size, whole)
        links = StageLinks(info, H, torch.float32, torch.device("cpu"))
        groups = [wires.groups[rank, rank + step] for step in (-stage_size, stage_size)]
        assert not groups[0] & groups[1]
        taken = None
        if not info.is_first_stage:
            links.expect(2)
            taken = links.take()
        if not info.is_last_stage:
            links.send(torch.full((2, H), float(rank)))
            links.finish()
        return taken

    with (
        patch.object(distributed, "isend", wires.isend),
        patch.object(distributed, "irecv", wires.irecv),
        patch.object(distributed, "new_group", lambda ranks: other),
        ThreadPoolExecutor(size) as pool,
    ):
        taken = list(pool.map(run, range(size), timeout=TIMEOUT_S))
    for rank, hidden in enumerate(taken):
        expected = torch.full((2, H), float(rank - stage_size))
        assert hidden is None if rank < stage_size else hidden.equal(expected)


def test_what_was_sent_is_let_go_where_the_backend_does_not_tell():
    info = rank_info(0, 2, 1, distributed.ProcessGroup(0, 2))
    with patch.object(distributed, "isend", lambda *args, **kwargs: Sent()):
        links = StageLinks(info, H, torch.float32, torch.device("cpu"))
        kept = []
        for _ in range(3 * MAX_SENDS):
            hidden = torch.zeros(1, H)
            kept.append(weakref.ref(hidden))
            links.send(hidden)
        del hidden
        assert sum(one() is not None for one in kept) == MAX_SENDS
        links.finish()
        assert not any(one() is not None for one in kept)
