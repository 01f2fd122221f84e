"""A schedule that is written as CSV is the same when it is read."""

import pytest
from hypothesis import given, settings

from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.schedule import Schedule
from tests.helpers.pipeline_schedules import generators


@settings(max_examples=20)
@given(generators)
def test_schedule_reads_what_it_writes(generator):
    schedule = with_communication(generator.build())
    assert Schedule.from_csv(schedule.to_csv()) == schedule


def test_schedule_says_where_it_cannot_be_read():
    with pytest.raises(ValueError, match="line 2 of the schedule: '1X0' is not an action"):
        Schedule.from_csv("0F0,0B0\n1F0,1X0\n")
    with pytest.raises(ValueError, match="the schedule is empty"):
        Schedule.from_csv("")
