"""Runs all ranks of a schedule in threads, with passes that count instead of computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event
from types import SimpleNamespace
from typing import Any

import torch

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.communication import partner_of
from megatron.early_exit.schedules.execution.executor import Executor
from tests.helpers.speed import patient

TIMEOUT_S = patient(60)


class Box:
    """One message: what is sent, and when both sides have posted their part."""

    def __init__(self) -> None:
        self.queue: Queue = Queue()
        self.is_sent, self.is_expected = Event(), Event()


class Mail:
    """Messages between threads.

    Args:
        boxes: of all messages, by their receives.
        blocking: a send stops the thread until the receive is posted.
    """

    def __init__(self, boxes: dict[Action, Box], blocking: bool = False) -> None:
        self._boxes, self._blocking = boxes, blocking
        self._events: list[Event] = []
        self._posted: dict[tuple[str, Microbatch], Action] = {}
        self._on_the_way: dict[tuple[str, Microbatch], tuple] = {}

    def send(self, action, tensor, when_sent):
        box = self._boxes[partner_of(action)]
        box.queue.put(tensor.clone())
        box.is_sent.set()
        self._events.append(box.is_expected)
        if self._blocking:
            self.synchronize()
        self._on_the_way[action.kind, action.microbatch] = tensor, when_sent

    def receive(self, action):
        self._posted[action.kind, action.microbatch] = action
        self._boxes[action].is_expected.set()
        self._events.append(self._boxes[action].is_sent)

    def synchronize(self):
        """Wait until everything that is posted here is so on the other side, too."""
        assert all(event.wait(TIMEOUT_S) for event in self._events), "the ranks wait for ever"
        self._events.clear()

    def take(self, kind, microbatch):
        action = self._posted.pop((kind, microbatch), None)
        return None if action is None else self._boxes[action].queue.get(timeout=TIMEOUT_S)

    def end_send(self, kind, microbatch):
        tensor, when_sent = self._on_the_way.pop((kind, microbatch), (None, None))
        if when_sent is not None:
            when_sent(tensor)

    def end_all_sends(self):
        for key in list(self._on_the_way):
            self.end_send(*key)


class Numbers:
    """Passes that count: a hidden state is the number of stages that it has passed, and a gradient
    is the stage at which it began.

    What exits learn from the last stage, where they do, comes by events: of the microbatches that
    it has run."""

    def __init__(
        self,
        stage: int,
        num_stages: int,
        before_pass: Callable[[], None] = lambda: None,
        last_has_run: Mapping[Microbatch, Event] | None = None,
    ) -> None:
        self.before_pass = before_pass
        self.last_has_run = last_has_run
        self.is_first_stage, self.is_last_stage = stage == 0, stage == num_stages - 1
        self.config = SimpleNamespace(no_sync_func=None, grad_sync_func=None)
        self.model = None
        self.workload = self
        self.stage = stage
        self.log: list[str] = []
        self.freed = 0

    def forward(self, microbatch, hidden, keeps, ends_at_exit):
        self.before_pass()
        assert (hidden is None) == self.is_first_stage
        passed = 0 if hidden is None else int(hidden)
        assert passed == self.stage
        self.log.append(f"F{microbatch}{' kept' * keeps}{' ends' * ends_at_exit}")
        if self.last_has_run and self.is_last_stage:
            self.last_has_run[microbatch].set()
        return torch.tensor(passed + 1)

    def release(self, output):
        self.freed += 1

    def backward(self, microbatch, alive, gradient):
        self.before_pass()
        assert int(alive.output) == self.stage + 1
        start = self.stage if gradient is None else int(gradient)
        self.log.append(f"B{microbatch} from {start}")
        return torch.tensor(start)

    def exits_backward(self, microbatch):
        self.before_pass()
        if self.last_has_run:
            assert self.last_has_run[microbatch].wait(TIMEOUT_S), "the ranks wait for ever"
        self.log.append(f"L{microbatch}")


def run_ranks(
    schedule: Any,
    blocking: bool = False,
    synchronizing: bool = False,
    learns_from_last: bool = False,
) -> list[Numbers]:
    """Run all ranks of a schedule, each in a thread.

    Args:
        schedule: with its messages.
        blocking: sends stop their rank until the receive is posted.
        synchronizing: ranks wait before each pass for all that they have posted, as where CUDA
            gives memory back.
        learns_from_last: a microbatch's exits wait until the last stage has run it forward.
    """
    boxes = {action: Box() for rank in schedule.ranks for action in rank}
    mails = [Mail(boxes, blocking) for _ in schedule.ranks]
    has_run = {a.microbatch: Event() for a in schedule.actions} if learns_from_last else None
    passes = [
        Numbers(stage, len(mails), mail.synchronize if synchronizing else lambda: None, has_run)
        for stage, mail in enumerate(mails)
    ]
    executors = list(map(Executor, schedule.ranks, passes, mails))
    with ThreadPoolExecutor(schedule.num_ranks) as pool:
        for done in [pool.submit(executor.run) for executor in executors]:
            done.result(timeout=TIMEOUT_S)
    return passes
