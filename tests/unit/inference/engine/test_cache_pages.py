"""Pages are given out within the budget, and all come back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference.engine.cache_pages import CachePages, common_length
from megatron.early_exit.inference.sequence import Sequence

BYTES = (3, 2)
SIZE = 4


def sequence_of(key: int, prompt: list[int], exits: tuple[int, ...] = ()) -> Sequence:
    return Sequence(key, prompt, exits=frozenset(exits))


def admitted(pages: CachePages, sequence: Sequence) -> bool:
    """As the scheduler admits."""
    fits = pages.admit(sequence)
    sequence.num_admissions += fits
    return fits


def run(pages: CachePages, sequence: Sequence, depth: int, end: int) -> bool:
    """Positions up to `end` go through the first `depth` segments."""
    if not pages.reserve([(sequence, 0, depth - 1, end)]):
        return False
    for segment in range(depth):
        sequence.cached[segment] = max(sequence.cached[segment], end)
    return True


def stored(pages: CachePages, sequence: Sequence) -> list[tuple[int, int]]:
    """As a request ends: its first `cached` tokens are final. Index and depth of new pages."""
    sequence.generated.append(0)
    copies = pages.store(sequence, [])
    pages.release(sequence.key)
    return [(copy.index, copy.depth) for copy in copies]


STEPS = st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(1, 2), st.booleans())


@settings(max_examples=150)
@given(budget=st.integers(5, 60), steps=st.lists(STEPS, max_size=12), counts=st.booleans())
def test_never_more_than_the_budget(budget, steps, counts):
    pages = CachePages(BYTES, budget, SIZE, reserved=0 if counts else 1000)
    store: dict[int, int] = {}
    for key, (kind, length, depth, ends) in enumerate(steps):
        sequence = sequence_of(key, [kind] * length)
        if not admitted(pages, sequence):
            assert counts
            continue
        begins = sequence.cached[0]
        assert begins < length
        assert [page.number in store for page in pages.take_prefix(key)].count(False) == 0
        fits = run(pages, sequence, depth, length)
        assert pages.bytes_stored + (pages.bytes_held if counts else 0) <= budget
        if ends and fits:
            stored(pages, sequence)
        elif ends:
            pages.release(key)
        for number in pages.take_dropped():
            store.pop(number, None)
        store |= {page.number: page.depth for page in pages._tree.match([kind] * length)}
        assert pages.bytes_stored + (pages.bytes_held if counts else 0) <= budget
        assert pages.bytes_stored == sum(sum(BYTES[:depth]) for depth in store.values())
        assert pages.num_stored == len(store)


def test_a_segment_that_is_never_reached_takes_no_pages():
    pages = CachePages(BYTES, 100, SIZE)
    sequence = sequence_of(0, [1] * 9, exits=(0,))
    assert admitted(pages, sequence)
    assert run(pages, sequence, 1, 9)
    assert pages.bytes_held == 3 * BYTES[0]
    assert pages.counts.taken == [3, 0]
    assert run(pages, sequence, 2, 9)
    assert pages.bytes_held == 3 * sum(BYTES)
    pages.release(0)
    assert pages.bytes_held == 0


def test_pages_that_more_segments_have_seen_are_added_to():
    pages = CachePages(BYTES, 100, SIZE)
    for key, (depth, expected) in enumerate(
        [(1, [(0, 1), (1, 1)]), (2, [(0, 2), (1, 2)]), (1, [])]
    ):
        sequence = sequence_of(key, [1] * 8 + [key])
        assert admitted(pages, sequence)
        assert sequence.num_cached == (8 if key else 0)
        assert run(pages, sequence, depth, 9)
        assert stored(pages, sequence) == expected
    assert pages.bytes_stored == 2 * sum(BYTES)
    assert pages.counts.cached_tokens == 16


def test_the_last_positions_are_computed_in_any_case():
    pages = CachePages(BYTES, 100, SIZE)
    first = sequence_of(0, [1] * 8)
    assert admitted(pages, first)
    assert run(pages, first, 2, 8)
    assert stored(pages, first) == [(0, 2), (1, 2)]
    again = sequence_of(1, [1] * 8)
    assert admitted(pages, again)
    assert again.cached == [4, 4]
    drafting = sequence_of(2, [1] * 6)
    drafting.drafts = [1, 1, 1]
    assert admitted(pages, drafting)
    assert drafting.cached == [4, 4]
    assert drafting.length - drafting.cached[0] >= drafting.num_verified


def test_a_draft_that_was_refused_is_not_kept():
    """The token in its place is another one."""
    pages = CachePages(BYTES, 100, SIZE)
    sequence = sequence_of(0, [1] * 7)
    assert admitted(pages, sequence)
    assert run(pages, sequence, 2, 8)
    assert stored(pages, sequence) == [(0, 2)]


def test_who_was_preempted_waits_for_all_segments():
    pages = CachePages(BYTES, 2 * sum(BYTES), SIZE)
    other = sequence_of(0, [1] * 4)
    assert admitted(pages, other)
    assert run(pages, other, 2, 4)
    leaving = sequence_of(1, [2] * 4, exits=(0,))
    assert admitted(pages, leaving)
    assert run(pages, leaving, 1, 4)
    assert not run(pages, leaving, 1, 5)
    assert pages.bytes_held == sum(BYTES) + BYTES[0]
    pages.release(1)
    leaving.generated = [2]
    assert not admitted(pages, leaving)
    pages.release(0)
    assert admitted(pages, leaving)


def test_waiting_for_another_is_worth_it_where_it_computes_most():
    pages = CachePages(BYTES, 1000, SIZE)
    other = sequence_of(0, [1] * 16)
    assert pages.is_worth_waiting(sequence_of(1, [1] * 16), other)
    assert pages.is_worth_waiting(sequence_of(1, [1] * 12 + [2] * 8), other)
    assert not pages.is_worth_waiting(sequence_of(1, [1] * 8 + [2] * 9), other)
    assert not pages.is_worth_waiting(sequence_of(1, [1] * 3), other)
    assert admitted(pages, other)
    assert run(pages, other, 2, 16)
    assert stored(pages, other)
    assert not pages.is_worth_waiting(sequence_of(1, [1] * 16), other)


@given(one=st.lists(st.integers(0, 1)), other=st.lists(st.integers(0, 1)))
def test_common_length(one, other):
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_length(one, other) == expected
