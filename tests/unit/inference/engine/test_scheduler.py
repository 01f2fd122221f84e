"""The scheduler alone, driven by decisions that Hypothesis makes: no tensors, no model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.engine.scheduler import ScheduledBatch, Scheduler
from megatron.early_exit.inference.sequence import Sequence

SEGMENTS = 3
ALL = {0, 1, 2, 3}


def sequence_of(key: int, length: int, group: int | None = None) -> Sequence:
    return Sequence(key, [0] * length, group=key if group is None else group)


class Simulation:
    """Sequences that leave where they are told to; checks what must hold at every step."""

    def __init__(
        self,
        scheduler: Scheduler,
        prompts: list[int],
        depths: list[list[int]],
        run_on: bool = True,
        propagates: bool = False,
    ) -> None:
        self.scheduler, self.run_on, self.propagates = scheduler, run_on, propagates
        self.prompts, self.depths = prompts, depths
        self.generated = [0] * len(prompts)
        self.ran: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.held: dict[tuple[int, int], list[int]] = {}
        self.steps: list[ScheduledBatch] = []
        self.turns: list[int] = []
        """For each step how often the scheduler had been asked for the next one."""
        self.order: list[int] = []

    def run(self) -> None:
        for key, prompt in enumerate(self.prompts):
            self.scheduler.add(sequence_of(key, prompt))
        while True:
            for sequence in self.scheduler.admit():
                self.order.append(sequence.key)
                sequence.exits = frozenset(range(self.scheduler.num_segments - 1))
                sequence.propagates = self.propagates
                self.scheduler.exit_rates.start(sequence, self.run_on)
            step = self.scheduler.next()
            if step is None:
                return
            turn = self.turns[-1] + 1 if self.turns else 0
            passed: dict[int, list[int]] = {}
            while step is not None:
                self.steps.append(step)
                self.turns.append(turn)
                assert len(self.steps) < 10_000, "does not come to an end"
                self._check(step)
                complete = self.scheduler.ran(step)
                for index in complete:
                    own = passed.setdefault(step.sequences[index].key, [])
                    own.extend(range(step.segment, step.last + 1))
                step = self.scheduler.onward(step, complete)
            for key, segments in passed.items():
                self._decide(key, segments)

    def _check(self, step: ScheduledBatch) -> None:
        scheduler = self.scheduler
        assert step.spans
        assert len({span.slot for span in step.spans}) == len(step.spans)
        lengths = [span.end - span.start for span in step.spans]
        assert lengths == [1] * lengths.count(1) + [n for n in lengths if n > 1]
        assert sum(lengths) <= scheduler.max_rows + 1 or len(lengths) == 1
        for sequence, span in zip(step.sequences, step.spans, strict=True):
            assert sequence.slot == span.slot
            assert span.start == sequence.start(step.segment) < span.end <= sequence.limit
            before = step.segment - 1
            assert before < 0 or span.end <= sequence.cached[before]
            for segment in range(step.segment, step.last + 1):
                assert span.start == sequence.start(segment)
                held = [one for one in step.held(segment) if one.slot == span.slot]
                assert [one.end for one in held] == [span.start] * len(held)
                own = self.held.setdefault((sequence.key, segment), [])
                own += [position for one in held for position in range(one.start, one.end)]
                self.ran.setdefault((sequence.key, segment), []).append((span.start, span.end))
            assert sequence.exits.isdisjoint(range(step.segment, step.last))
        fronts = {one.segment for one in scheduler.running.values() if one not in step.sequences}
        assert fronts.isdisjoint(range(step.segment + 1, step.last + 1))
        slots = [sequence.slot for sequence in scheduler.running.values()]
        assert len(slots) == len(set(slots)) <= scheduler.num_slots

    def _decide(self, key: int, passed: list[int]) -> None:
        """Ask the heads that a sequence has passed."""
        sequence = self.scheduler.running[key]
        assert passed == list(range(passed[0], passed[-1] + 1))
        assert len(passed) == 1 or sequence.can_defer_exit
        depth = self.depths[key][self.generated[key]]
        for segment in passed:
            if segment < SEGMENTS - 1 and segment < len(sequence.exit_rates) - 1:
                self.scheduler.exit_rates.learn(sequence, segment, segment == depth)
            if segment == depth:
                break
        else:
            return
        self.generated[key] += 1
        if self.generated[key] == len(self.depths[key]):
            self.scheduler.remove(key)
        else:
            if self.propagates:
                sequence.leave(depth)
            sequence.generated.append(0)
            self.scheduler.go_on(sequence)


requests = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(0, SEGMENTS - 1), min_size=1, max_size=12)),
    min_size=1,
    max_size=8,
)


costs = st.builds(
    Costs,
    segments=st.tuples(*[st.floats(0.1, 10)] * SEGMENTS),
    head=st.floats(0, 10),
    shares_heads=st.booleans(),
    rows=st.floats(1, 100),
    step=st.floats(0, 0.1),
)


@settings(max_examples=200)
@given(
    batch=requests,
    num_slots=st.integers(1, 5),
    max_rows=st.integers(1, 16),
    quorum=st.floats(0, 1),
    patience=st.integers(1, 8),
    costs=costs,
    run_on=st.booleans(),
)
def test_everything_needed_runs_once(batch, num_slots, max_rows, quorum, patience, costs, run_on):
    prompts, depths = map(list, zip(*batch, strict=True))
    scheduler = Scheduler(SEGMENTS, num_slots, max_rows, quorum, patience, costs)
    simulation = Simulation(scheduler, prompts, depths, run_on)
    simulation.run()
    assert simulation.generated == [len(own) for own in depths]
    assert simulation.order == sorted(simulation.order), "first come, first served"
    for key, (prompt, own) in enumerate(batch):
        for segment in range(SEGMENTS):
            spans = simulation.ran.get((key, segment), [])
            assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
            deep = [i for i, depth in enumerate(own) if depth >= segment]
            needed = prompt + deep[-1] if deep else 0
            ran = spans[-1][1] if spans else 0
            # Positions that wait for an exit's word never run behind it in vain.
            assert ran >= needed if run_on else ran == needed
    assert not scheduler.running


@settings(max_examples=100)
@given(batch=requests, num_slots=st.integers(1, 5), max_rows=st.integers(1, 16), costs=costs)
def test_what_is_held_gets_keys_and_values_only(batch, num_slots, max_rows, costs):
    prompts, depths = map(list, zip(*batch, strict=True))
    scheduler = Scheduler(SEGMENTS, num_slots, max_rows, costs=costs)
    simulation = Simulation(scheduler, prompts, depths, run_on=False, propagates=True)
    simulation.run()
    for key, (prompt, own) in enumerate(batch):
        for segment in range(SEGMENTS):
            deep = [i for i, depth in enumerate(own) if depth >= segment]
            needed = prompt + deep[-1] if deep else 0
            leaving = [prompt - 1 + i for i, depth in enumerate(own) if depth < segment]
            held = [position for position in leaving if position < needed]
            ran = [p for span in simulation.ran.get((key, segment), []) for p in range(*span)]
            assert simulation.held.get((key, segment), []) == held
            assert ran == [position for position in range(needed) if position not in held]


def test_exits_that_are_never_taken_are_asked_with_the_last_head():
    scheduler = Scheduler(SEGMENTS, 2, costs=Costs((1.0,) * SEGMENTS, head=1.0))
    simulation = Simulation(scheduler, [1] * 2, [[2] * 100] * 2)
    simulation.run()
    late = simulation.steps[-60:]
    assert [step.segment for step in late] == [0, 1, 2] * 20
    assert all(keys(step) == {0, 1} for step in late)


def test_exits_that_are_always_taken_leave_the_rest_alone():
    scheduler = Scheduler(SEGMENTS, 2, costs=Costs((1.0,) * SEGMENTS, head=1.0))
    simulation = Simulation(scheduler, [1] * 2, [[0] * 100] * 2)
    simulation.run()
    assert {step.segment for step in simulation.steps} == {0}


@pytest.mark.parametrize("asks_gates", [False, True])
def test_gates_are_asked_where_a_head_would_not_be(asks_gates):
    """A vocabulary as large as the layers behind an exit is not read to leave there now and then; a
    gate costs nothing."""
    scheduler = Scheduler(2, 1, costs=Costs((1.0, 1.0), head=1.0))
    sequence = sequence_of(0, 1)
    sequence.exits, sequence.asks_gates = frozenset({0}), asks_gates
    scheduler.add(sequence)
    scheduler.admit()
    scheduler.exit_rates.start(sequence)
    sequence.exit_rates[0] = 0.3
    step = scheduler.next()
    behind = scheduler.onward(step, scheduler.ran(step))
    assert (step.segment, step.last) == (0, 0)
    assert (behind is None) == asks_gates


def test_who_is_let_out_by_a_gate_goes_no_deeper_in_a_step():
    scheduler = Scheduler(2, 3, costs=Costs((1.0, 1.0), head=1.0, held=0.05, step=0.5))
    for key in range(3):
        scheduler.add(sequence_of(key, 1))
    for sequence in scheduler.admit():
        sequence.exits, sequence.asks_gates = frozenset({0}), True
        sequence.propagates = True
        scheduler.exit_rates.start(sequence)
        # So often that all would wait, if nobody had asked the gates.
        sequence.exit_rates[0] = 0.75
    step = scheduler.next()
    assert (step.segment, step.last) == (0, 0)
    complete = scheduler.ran(step)
    behind = scheduler.onward(step, complete, let_out={0, 2})
    assert keys(behind) == {1}
    assert scheduler.onward(step, complete, let_out={0, 1, 2}) is None


def test_those_that_ask_nothing_run_with_those_that_ask_gates():
    """Of few that ask gates all are taken to the end, and those beside them are there anyway."""
    scheduler = Scheduler(2, 4, costs=Costs((1.0, 9.0), head=1.0, held=0.05))
    for key in range(4):
        scheduler.add(sequence_of(key, 1))
    for sequence in scheduler.admit():
        if sequence.key:
            sequence.exits, sequence.asks_gates = frozenset({0}), True
            sequence.propagates = True
        scheduler.exit_rates.start(sequence)
        sequence.exit_rates[0] *= 1.9
    step = scheduler.next()
    behind = scheduler.onward(step, scheduler.ran(step), let_out={1, 3})
    assert (step.segment, step.last, keys(step)) == (0, 0, ALL)
    assert behind is not None
    assert (behind.segment, keys(behind)) == (1, {0, 2})


def test_those_that_leave_nearly_always_wait_while_others_run_on():
    """Where they would be held, that saves arithmetic; else it is needed in any case."""
    for propagates in (True, False):
        scheduler = Scheduler(SEGMENTS, 4, costs=Costs((1.0,) * SEGMENTS, head=3.0, held=0.05))
        depths = [[0] * 60, [0] * 60, [2] * 60, [2] * 60]
        simulation = Simulation(scheduler, [1] * 4, depths, propagates=propagates)
        simulation.run()
        late = list(zip(simulation.turns, simulation.steps, strict=True))[60:120]
        first = {turn: keys(step) for turn, step in late if step.segment == 0}
        together = [keys(step) for turn, step in late if step.segment and first.get(turn) == ALL]
        assert together
        assert {0, 1}.isdisjoint(set().union(*together)) == propagates


def test_those_that_wait_deeper_are_taken_along():
    scheduler = Scheduler(2, 4, costs=Costs((1.0, 1.0), head=1.0))
    depths = [[0] * phase + [0, 0, 0, 1] * 20 for phase in range(4)]
    simulation = Simulation(scheduler, [1] * 4, depths)
    simulation.run()
    joined = [
        (first, second)
        for first, second in pairwise(simulation.steps)
        if (first.segment, second.segment) == (0, 1) and keys(second) - keys(first)
    ]
    assert joined


@given(prompt=st.integers(2, 60), others=st.integers(1, 4), max_rows=st.integers(1, 16))
def test_a_long_prompt_does_not_starve_those_that_decode(prompt, others, max_rows):
    scheduler = Scheduler(1, others + 1, max_rows)
    simulation = Simulation(scheduler, [1] * others + [prompt], [[0] * 100] * others + [[0]])
    simulation.run()
    with_prompt = [step for step in simulation.steps if others in keys(step)]
    # It comes forward with every batch; its last position is a single one among the others'.
    *all_but_last, last = with_prompt
    assert all_but_last == simulation.steps[: len(all_but_last)]
    for step in all_but_last:
        assert len(keys(step)) == min(others, max_rows) + 1
    assert simulation.steps.index(last) <= len(all_but_last) + others


def keys(step: ScheduledBatch) -> set[int]:
    return {sequence.key for sequence in step.sequences}


def test_nobody_waits_longer_than_the_patience():
    scheduler = Scheduler(2, 4, patience=3, quorum=0.5)
    # Three leave at once, again and again; one waits for the second segment.
    simulation = Simulation(scheduler, [1] * 4, [[0] * 30, [0] * 30, [0] * 30, [1, 1, 1]])
    simulation.run()
    waits, since = [], None
    for turn, step in zip(simulation.turns, simulation.steps, strict=True):
        if 3 in keys(step) and step.segment == 0:
            since = turn
        elif 3 in keys(step):
            waits.append(turn - since)
    assert len(waits) == 3
    assert max(waits) <= 4


def test_a_cancelled_sequence_leaves_its_slot_to_the_next():
    scheduler = Scheduler(1, 1)
    for key in range(3):
        scheduler.add(sequence_of(key, 5))
    assert [sequence.key for sequence in scheduler.admit()] == [0]
    scheduler.remove(1)
    scheduler.remove(0)
    assert [sequence.key for sequence in scheduler.admit()] == [2]


def test_positions_that_are_asked_together_run_together():
    scheduler = Scheduler(1, 1, max_rows=4)
    scheduler.add(Sequence(0, [0] * 8, drafts=[0, 0]))
    (sequence,) = scheduler.admit()
    lengths = []
    while (step := scheduler.next()) and sequence.waiting:
        lengths.append(step.spans[0].end - step.spans[0].start)
        scheduler.ran(step)
    assert sum(lengths) == 10
    assert lengths[-1] >= 3


def test_a_deeper_segment_waits_for_company():
    scheduler = Scheduler(2, 4, quorum=0.5)
    # One goes deep at its first token, a second one two tokens later.
    simulation = Simulation(scheduler, [1] * 4, [[1, 0], [0, 0, 1, 0], [0] * 8, [0] * 8])
    simulation.run()
    first_deep = next(i for i, step in enumerate(simulation.steps) if step.segment == 1)
    assert [step.segment for step in simulation.steps[: first_deep + 1]] == [0, 0, 0, 1]
    assert keys(simulation.steps[first_deep]) == {0, 1}


def test_quorum_out_of_range():
    with pytest.raises(ValueError, match=r"quorum 1.5 is out of range, allowed: 0 to 1"):
        Scheduler(1, 1, quorum=1.5)


@pytest.mark.parametrize("name", ["num_slots", "max_rows", "patience"])
def test_sizes_out_of_range(name):
    sizes = {"num_slots": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} 0 is out of range, allowed: 1 or more"):
        Scheduler(1, **sizes)


def admitted_in_order(scheduler, rounds, length=1):
    """The groups that get slots, where the oldest sequence ends in each round."""
    order = []
    for _ in range(rounds):
        order += [sequence.group for sequence in scheduler.admit()]
        scheduler.remove(next(iter(scheduler.running)))
    return order


def test_groups_take_turns_whatever_their_sizes():
    scheduler = Scheduler(1, 2)
    for key in range(100):
        scheduler.add(sequence_of(key, 5, group=1))
    scheduler.add(sequence_of(100, 5, group=2))
    for key in range(101, 104):
        scheduler.add(sequence_of(key, 5, group=3))
    # The oldest ends each time: who has the fewest is next, then who has waited longest.
    assert admitted_in_order(scheduler, 7) == [1, 2, 3, 1, 3, 1, 3, 1]


def test_a_group_leaves_places_to_those_that_come_later():
    scheduler = Scheduler(1, 16)
    for key in range(128):
        scheduler.add(sequence_of(key, 5, group=1))
    assert len(scheduler.admit()) == 12
    scheduler.add(sequence_of(200, 5))
    assert [sequence.key for sequence in scheduler.admit()] == [200]
    # Sequences that nobody has put together do not wait for each other.
    for key in range(300, 340):
        scheduler.add(sequence_of(key, 5))
    assert len(scheduler.admit()) == 3


def test_a_small_group_has_all_slots_of_a_small_engine():
    scheduler = Scheduler(1, 3)
    for key in range(3):
        scheduler.add(sequence_of(key, 5, group=1))
    assert len(scheduler.admit()) == 3


def test_prompts_of_a_group_do_not_stand_in_front_of_anothers():
    scheduler = Scheduler(1, 16, max_rows=8)
    for key in range(12):
        scheduler.add(sequence_of(key, 64, group=1))
    scheduler.admit()
    scheduler.ran(scheduler.next())
    scheduler.add(sequence_of(50, 4))
    scheduler.admit()
    found = []
    while 50 not in found:
        step = scheduler.next()
        scheduler.ran(step)
        found += keys(step)
    # Behind the one that has begun and the next one, not all twelve; a third shares the batch.
    assert set(found) <= {0, 1, 2, 50}


def test_those_that_go_away_do_not_wait_any_longer():
    scheduler = Scheduler(1, 1)
    for key in range(4):
        scheduler.add(sequence_of(key, 5, group=key // 2))
    scheduler.remove(0)
    scheduler.remove(1)
    assert admitted_in_order(scheduler, 2) == [1, 1]
    assert scheduler.admit() == []


def test_tokens_with_drafts_do_not_wait_behind_a_long_prompt():
    scheduler = Scheduler(1, 3, max_rows=8)
    for key, length in enumerate((100, 5, 5)):
        scheduler.add(sequence_of(key, length))
    prompt, *begun = scheduler.admit()
    for one in begun:
        one.cached = [4]
        one.drafts = [7, 7]
    batch = scheduler.batch(0, [prompt, *begun])
    spans = dict(zip((one.key for one in batch.sequences), batch.spans, strict=True))
    assert {key: (span.start, span.end) for key, span in spans.items()} == {
        0: (0, 2),
        1: (4, 7),
        2: (4, 7),
    }
