"""What stages do with positions of which some are held."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference.distributed.stage_task import (
    HeadMessage,
    HeldRows,
    StageTask,
    rows_of,
)
from megatron.early_exit.inference.model.kv_cache import Span, in_pass_order
from megatron.early_exit.inference.modes.rule import ExitRule


def test_a_position_is_held_behind_the_exit_that_gives_its_token():
    task = StageTask(1, 0, 3, 6, rule=ExitRule((0, 1), (0.5, 0.5)), final=True, propagates=True)
    task, told = task.behind(HeadMessage(0, 1.0, 7, -1.0, 0.4))
    assert (task.held, told) == ((), False)
    task, told = task.behind(HeadMessage(1, 1.0, 7, -1.0, 0.6))
    assert (task.held, told) == (((5, 1),), True)
    assert StageTask.from_message(task.message()) == task


def test_without_propagation_nothing_is_held():
    task = StageTask(1, 0, 3, 6, rule=ExitRule((0,), (0.0,)), final=True)
    assert task.behind(HeadMessage(0, 1.0, 7, -1.0, 0.4))[0].held == ()


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[Span], list[StageTask]]:
    """Spans with one task each, some of whose positions are held."""
    tasks = []
    for slot in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, 5))
        end = start + draw(st.integers(1, 6))
        behind = draw(st.dictionaries(st.integers(start, end - 1), st.integers(0, 2)))
        tasks.append(StageTask(slot, slot, start, end, held=tuple(sorted(behind.items()))))
    spans = [Span(task.slot, task.start, task.end) for task in tasks]
    return sorted(spans, key=in_pass_order), tasks


@settings(max_examples=100)
@given(drawn=passes(), segment=st.integers(0, 3))
def test_rows_are_divided_and_found_again(drawn, segment):
    spans, tasks = drawn
    parts = HeldRows.of(spans, tasks, segment)
    found = [
        (slot, position)
        for span_list in (parts.held, *parts.rounds)
        for slot, start, end in span_list
        for position in range(start, end)
    ]
    rows = [(slot, position) for slot, start, end in spans for position in range(start, end)]
    assert sorted(found) == sorted(rows)
    held = {(task.slot, place) for task in tasks for place, exit_ in task.held if exit_ < segment}
    assert {one for one in rows if one in held} == set(found[: len(held)])
    for one_round in parts.rounds:
        assert one_round == sorted(one_round, key=in_pass_order)
        assert len({span.slot for span in one_round}) == len(one_round)
        assert [rows[row] for row in rows_of(one_round, spans)] == [
            (slot, position) for slot, start, end in one_round for position in range(start, end)
        ]
    for slot in {span.slot for span in spans}:
        own = [span for one_round in parts.rounds for span in one_round if span.slot == slot]
        assert own == sorted(own), "keys and values of earlier positions come first"
