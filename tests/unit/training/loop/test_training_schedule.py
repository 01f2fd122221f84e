"""Training steps by lists of actions: each list is proved before it is run, and once."""

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.schedules.check import ScheduleError  # noqa: E402
from megatron.early_exit.schedules.communication import with_communication  # noqa: E402
from megatron.early_exit.schedules.generators import OneFOneB  # noqa: E402
from megatron.early_exit.schedules.schedule import Schedule  # noqa: E402
from megatron.early_exit.training.loop import training_schedule  # noqa: E402
from megatron.early_exit.training.loop.training_schedule import ScheduledSteps  # noqa: E402


class Ran(Exception):
    """A step has come to the pass that it would run."""


@pytest.fixture
def proved(monkeypatch):
    """What is proved, of steps that end where they would run."""
    found = []
    prove = training_schedule.check

    def check(schedule):
        found.append(schedule)
        prove(schedule)

    def run(schedule):
        raise Ran

    monkeypatch.setattr(training_schedule, "check", check)
    monkeypatch.setattr(training_schedule.Contributions, "of", run)
    return found


def step(steps: ScheduledSteps, num_microbatches: int) -> None:
    steps(
        forward_step_func=None,
        data_iterator=None,
        model=[None],
        num_microbatches=num_microbatches,
        seq_length=1,
        micro_batch_size=1,
    )


def test_each_list_is_proved_once(proved):
    lists = [OneFOneB(num_ranks=2, num_microbatches=number) for number in (2, 3)]
    schedules = [with_communication(one.build()) for one in lists]
    steps = ScheduledSteps(None, lambda number: schedules[number - 2])
    for number in (2, 3, 2, 3, 3):
        with pytest.raises(Ran):
            step(steps, number)
    assert proved == schedules


def test_a_list_that_cannot_run_is_refused(proved):
    stuck = Schedule.from_csv("0F0,0RB0,0SF0,0B0\n1RF0,1F0,1B0,1SB0\n")
    steps = ScheduledSteps(None, lambda number: stuck)
    for _ in range(2):
        with pytest.raises(ScheduleError, match="wait for each other for ever"):
            step(steps, 1)
