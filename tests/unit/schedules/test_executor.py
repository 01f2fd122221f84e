"""Each rank runs its list as it stands: what it computes with is what its neighbours have made."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.schedules.actions import Action, Microbatch  # noqa: E402
from megatron.early_exit.schedules.communication import (  # noqa: E402
    partner_of,
    with_communication,
)
from megatron.early_exit.schedules.execution.executor import Executor  # noqa: E402
from megatron.early_exit.schedules.generators import FilledOneFOneB, Tuning  # noqa: E402
from tests.helpers.pipeline_schedules import overfilled, tuning  # noqa: E402
from tests.helpers.speed import patient  # noqa: E402

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
    """Passes that count: a hidden state how many stages it has been through, a gradient how many
    stages it has come back through since it began, and where that was."""

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


def run(schedule) -> list[Numbers]:
    """All ranks of a schedule, each in a thread."""
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


@settings(max_examples=30, deadline=None)
@given(st.one_of(overfilled(), tuning()))
def test_all_of_each_list_is_run_with_its_neighbours_results(generator):
    schedule = with_communication(generator.build())
    for passes, rank in zip(run(schedule), schedule.computations.ranks, strict=True):
        done = [line.split()[0] for line in passes.log]
        assert done == [f"{action.kind}{action.microbatch}" for action in rank]
        backwards = [action for action in rank if action.kind == "B"]
        assert passes.freed == len(backwards)
        for line, action in zip(passes.log, rank, strict=True):
            if action.kind == "B":
                # Full microbatches and the cool-down's fills come back from the end.
                last = schedule.num_ranks - 1
                if action.microbatch.role == "w":
                    last = generator.warmup_depths[action.microbatch.index] - 1
                assert line.endswith(f" from {last}")


def test_only_what_goes_back_is_kept_and_fills_end_at_exits():
    filled = FilledOneFOneB(
        num_ranks=2,
        num_microbatches=1,
        backward_forward_ratio=2.0,
        num_warmup_fills=1,
        num_cooldown_fills=1,
    )
    logs = [passes.log for passes in run(with_communication(filled.build()))]
    assert logs == [
        ["F0 kept", "Fc0", "Fw0 kept ends", "Bw0 from 0", "B0 from 1"],
        ["F0 kept", "B0 from 1", "Fc0 kept", "Bc0 from 1"],
    ]
    tuned = Tuning(num_ranks=2, num_microbatches=1, exit_stages=frozenset({0, 1}))
    logs = [passes.log for passes in run(with_communication(tuned.build()))]
    assert logs == [["F0", "L0"], ["F0", "L0"]]


def test_divided_backwards_are_refused():
    with pytest.raises(ValueError, match="0I0 cannot be run, allowed: F, B, L and messages"):
        Executor([Action(0, "I", Microbatch(0))], Numbers(0, 1), Mail({}))
