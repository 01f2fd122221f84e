"""Runs all ranks of a schedule in threads, with passes that count instead of computing."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace
from typing import Any

import torch

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.communication import partner_of
from megatron.early_exit.schedules.execution.executor import Executor
from tests.helpers.speed import patient

TIMEOUT_S = patient(60)


class Mail:
    """Messages between threads."""

    def __init__(self, queues: dict[Action, Queue]) -> None:
        self._queues = queues
        self._posted: dict[tuple[str, Microbatch], Action] = {}
        self._on_the_way: dict[tuple[str, Microbatch], tuple] = {}

    def send(self, action, tensor, when_sent):
        self._queues[partner_of(action)].put(tensor.clone())
        self._on_the_way[action.kind, action.microbatch] = tensor, when_sent

    def receive(self, action):
        self._posted[action.kind, action.microbatch] = action

    def take(self, kind, microbatch):
        action = self._posted.pop((kind, microbatch), None)
        return None if action is None else self._queues[action].get(timeout=TIMEOUT_S)

    def end_send(self, kind, microbatch):
        tensor, when_sent = self._on_the_way.pop((kind, microbatch), (None, None))
        if when_sent is not None:
            when_sent(tensor)

    def end_all_sends(self):
        for key in list(self._on_the_way):
            self.end_send(*key)


class Numbers:
    """Passes that count: a hidden state is the number of stages that it has passed, and a gradient
    is the stage at which it began."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self.is_first_stage, self.is_last_stage = stage == 0, stage == num_stages - 1
        self.config = SimpleNamespace(no_sync_func=None, grad_sync_func=None)
        self.model = None
        self.workload = self
        self.stage = stage
        self.log: list[str] = []
        self.freed = 0

    def forward(self, microbatch, hidden, keeps, ends_at_exit):
        assert (hidden is None) == self.is_first_stage
        passed = 0 if hidden is None else int(hidden)
        assert passed == self.stage
        self.log.append(f"F{microbatch}{' kept' * keeps}{' ends' * ends_at_exit}")
        return torch.tensor(passed + 1)

    def release(self, output):
        self.freed += 1

    def backward(self, microbatch, alive, gradient):
        assert int(alive.output) == self.stage + 1
        start = self.stage if gradient is None else int(gradient)
        self.log.append(f"B{microbatch} from {start}")
        return torch.tensor(start)

    def exits_backward(self, microbatch):
        self.log.append(f"L{microbatch}")


def run_ranks(schedule: Any) -> list[Numbers]:
    """Run all ranks of a schedule, each in a thread."""
    queues: dict[Action, Queue] = defaultdict(Queue)
    for rank in schedule.ranks:
        for action in rank:
            queues[action] = Queue()
    passes = [Numbers(stage, schedule.num_ranks) for stage in range(schedule.num_ranks)]
    executors = [
        Executor(rank, one, Mail(queues)) for rank, one in zip(schedule.ranks, passes, strict=True)
    ]
    with ThreadPoolExecutor(schedule.num_ranks) as pool:
        for done in [pool.submit(executor.run) for executor in executors]:
            done.result(timeout=TIMEOUT_S)
    return passes
