"""Who gets memory, who has to give it back, and who waits for what another one computes."""

from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.sequence import Sequence

SIZE = 4


def scheduler_of(budget: int, num_slots: int = 4, keeps_prefixes: bool = False) -> Scheduler:
    pages = CachePages((1, 1), budget, SIZE, keeps_prefixes=keeps_prefixes)
    return Scheduler(2, num_slots, pages=pages)


def add(scheduler: Scheduler, key: int, length: int, exits: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence(key, [key] * length, group=key, exits=frozenset(exits))
    scheduler.add(sequence)
    return sequence


def admit(scheduler: Scheduler) -> list[int]:
    admitted = scheduler.admit()
    for sequence in admitted:
        scheduler.exit_rates.start(sequence)
    return [sequence.key for sequence in admitted]


def run_to_the_end(scheduler: Scheduler) -> list[int]:
    """Runs batches until each running sequence has been through; returns those in the last one."""
    step = scheduler.next()
    assert step is not None
    while step is not None:
        complete = scheduler.ran(step)
        keys = [sequence.key for sequence in step.sequences]
        step = scheduler.onward(step, complete)
    return keys


def test_who_finds_no_memory_is_first_when_there_is_some():
    scheduler = scheduler_of(budget=6)
    for key, length in enumerate([8, 8, 1]):
        add(scheduler, key, length)
    # The second one needs 4 pages of the 2 that are left; the third waits behind it.
    assert admit(scheduler) == [0]
    scheduler.remove(0)
    assert admit(scheduler) == [1, 2]


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler = scheduler_of(budget=6)
    first, second = add(scheduler, 0, 4), add(scheduler, 1, 4)
    assert admit(scheduler) == [0, 1]
    assert sorted(run_to_the_end(scheduler)) == [0, 1]
    for sequence in (first, second):
        sequence.generated.append(7)
        scheduler.go_on(sequence)
    add(scheduler, 2, 1)
    # Each needs two pages more, and there are two.
    assert run_to_the_end(scheduler) == [0]
    assert list(scheduler.running) == [0]
    assert scheduler.vacated == [second.slot]
    assert admit(scheduler) == []
    scheduler.remove(0)
    assert admit(scheduler) == [1, 2]
    assert second.cached == [0, 0]
    assert second.token_ids(0, 5) == [1, 1, 1, 1, 7]


def test_heads_that_have_been_asked_are_not_asked_again():
    scheduler = scheduler_of(budget=5)
    first, second = add(scheduler, 0, 4, (0,)), add(scheduler, 1, 4, (0,))
    assert admit(scheduler) == [0, 1]
    step = scheduler.next()
    assert step is not None
    assert (step.segment, step.last) == (0, 0)
    scheduler.ran(step)
    for sequence in (first, second):
        # What an exit has said takes both of them deeper, where there is no memory for both.
        sequence.exit_rates = [0.0, 1.0]
    add(scheduler, 2, 8)
    scheduler.pages.reserve([(first, 0, 0, 8), (second, 0, 0, 8)])
    run_to_the_end(scheduler)
    assert list(scheduler.running) == [0]
    assert second.num_answered == 1
    second.generated.append(3)
    scheduler.go_on(second)
    assert second.num_answered == 0


def test_who_is_cancelled_waits_nowhere():
    scheduler = scheduler_of(budget=100, keeps_prefixes=True)
    leader, follower, other = (Sequence(key, [5] * 9, group=key) for key in range(3))
    for sequence in (leader, follower, other):
        scheduler.add(sequence)
    assert admit(scheduler) == [0]
    scheduler.remove(1)
    assert admit(scheduler) == []
    scheduler.remove(0)
    assert admit(scheduler) == [2]
    scheduler.remove(2)
    assert admit(scheduler) == []
    assert not scheduler.running


def test_followers_come_when_what_they_need_is_there():
    scheduler = scheduler_of(budget=100, keeps_prefixes=True)
    leader, follower = Sequence(0, [5] * 9, group=0), Sequence(1, [5] * 12, group=1)
    for sequence in (leader, follower):
        scheduler.add(sequence)
    add(scheduler, 2, 3)
    assert admit(scheduler) == [0, 2]
    run_to_the_end(scheduler)
    leader.generated.append(1)
    assert scheduler.pages is not None
    assert len(scheduler.pages.store(leader, [])) == 2
    scheduler.stop_following(0)
    assert admit(scheduler) == [1]
    assert follower.cached == [8, 8]


def test_nobody_waits_for_one_whose_block_is_not_asked():
    """A multi-token-prediction module may draft instead of an exit: then the keys and values of the
    exit's block are not there."""
    scheduler = scheduler_of(budget=100, keeps_prefixes=True)
    scheduler.blocks = frozenset((0,))
    sequences = [Sequence(key, [5] * 9, group=key, exits=frozenset((0,))) for key in range(4)]
    sequences[0].is_asking = False
    for sequence in sequences[:2]:
        scheduler.add(sequence)
    assert admit(scheduler) == [0, 1]
    # But for one that asks it.
    for sequence in sequences[2:]:
        scheduler.add(sequence)
    assert admit(scheduler) == []


def test_followers_have_no_more_slots_than_others_of_their_group():
    """A group leaves a quarter of the slots to those that come later."""
    scheduler = scheduler_of(budget=1000, num_slots=8, keeps_prefixes=True)
    group = [Sequence(key, [5] * 9, group=0) for key in range(8)]
    for sequence in group:
        scheduler.add(sequence)
    assert admit(scheduler) == [0]
    run_to_the_end(scheduler)
    group[0].generated.append(1)
    assert scheduler.pages is not None
    scheduler.pages.store(group[0], [])
    scheduler.stop_following(0)
    assert admit(scheduler) == [1, 2, 3, 4, 5]
    add(scheduler, 9, 3)
    assert admit(scheduler) == [9]
