"""Each rank runs its list as it stands: what it computes with is what its neighbours have made."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.schedules.actions import Action, Microbatch  # noqa: E402
from megatron.early_exit.schedules.communication import with_communication  # noqa: E402
from megatron.early_exit.schedules.execution.executor import Executor  # noqa: E402
from megatron.early_exit.schedules.generators import FilledOneFOneB, Tuning  # noqa: E402
from tests.helpers.pipeline_schedules import overfilled, tuning  # noqa: E402
from tests.helpers.threaded_ranks import Mail, Numbers, run_ranks  # noqa: E402

WAITS = [{}, {"blocking": True}, {"synchronizing": True}]


@settings(max_examples=30, deadline=None)
@given(st.one_of(overfilled(), tuning()), st.sampled_from(WAITS))
def test_all_of_each_list_is_run_with_its_neighbours_results(generator, waits):
    schedule = with_communication(generator.build())
    if isinstance(generator, Tuning) and generator.num_ranks - 1 in generator.exit_stages:
        waits = {**waits, "learns_from_last": generator.learns_from_last}
    ranks = zip(run_ranks(schedule, **waits), schedule.computations.ranks, strict=True)
    for passes, rank in ranks:
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
    logs = [passes.log for passes in run_ranks(with_communication(filled.build()))]
    assert logs == [
        ["F0 kept", "Fc0", "Fw0 kept ends", "Bw0 from 0", "B0 from 1"],
        ["F0 kept", "B0 from 1", "Fc0 kept", "Bc0 from 1"],
    ]
    tuned = Tuning(num_ranks=2, num_microbatches=1, exit_stages=frozenset({0, 1}))
    logs = [passes.log for passes in run_ranks(with_communication(tuned.build()))]
    assert logs == [["F0", "L0"], ["F0", "L0"]]


def test_divided_backwards_are_refused():
    with pytest.raises(ValueError, match="0I0 cannot be run, allowed: F, B, L and messages"):
        Executor([Action(0, "I", Microbatch(0))], Numbers(0, 1), Mail({}))
