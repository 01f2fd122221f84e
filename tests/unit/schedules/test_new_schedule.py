"""The worked example of the docs: a schedule is one class, which is then proved, timed and run."""

from __future__ import annotations

import inspect

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.planner.costs.cost_model import CostModel  # noqa: E402
from megatron.early_exit.planner.simulation.simulator import simulate  # noqa: E402
from megatron.early_exit.schedules.actions import Action, Microbatch  # noqa: E402
from megatron.early_exit.schedules.check import ScheduleError, build_proved, check  # noqa: E402
from megatron.early_exit.schedules.communication import with_communication  # noqa: E402
from megatron.early_exit.schedules.generators.base import StageByStage  # noqa: E402
from tests.helpers.threaded_ranks import run_ranks  # noqa: E402


class GPipe(StageByStage):
    """All forwards, then all backwards (arXiv 1811.06965)."""

    def actions(self, stage: int) -> list[Action]:
        microbatches = [Microbatch(i) for i in range(self.num_microbatches)]
        return [Action(stage, kind, one) for kind in ("F", "B") for one in microbatches]

    def activation_limit(self, rank: int) -> int:
        return self.num_microbatches


def test_what_it_takes():
    lines = len(inspect.getsource(GPipe).splitlines())
    print(f"a new schedule: 1 file, {lines} lines")
    assert lines <= 40


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 3), (4, 8)])
def test_a_new_schedule_is_proved_timed_and_run(ranks, microbatches):
    schedule = build_proved(GPipe(num_ranks=ranks, num_microbatches=microbatches))
    assert schedule is build_proved(GPipe(num_ranks=ranks, num_microbatches=microbatches))
    with_messages = with_communication(schedule)
    check(with_messages)
    # Its bubble is p - 1 forwards and as many backwards, as the paper has it.
    timeline = simulate(schedule, CostModel.even(ranks, forward_s=1.0, backward_s=2.0))
    assert max(rank[-1].end_s for rank in timeline.ranks) == 3 * (microbatches + ranks - 1)
    for passes, rank in zip(run_ranks(with_messages), schedule.ranks, strict=True):
        assert [line.split()[0] for line in passes.log] == [
            f"{action.kind}{action.microbatch}" for action in rank
        ]
        assert passes.freed == microbatches


def test_a_promise_that_is_not_kept_is_found():
    class Modest(GPipe):
        def activation_limit(self, rank: int) -> int:
            return 1

    with pytest.raises(ScheduleError, match="activations"):
        build_proved(Modest(num_ranks=2, num_microbatches=3))
