"""Every generated list is valid, and what the papers say of it is true."""

from math import floor

import pytest
from hypothesis import assume, given, settings

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.check import check
from megatron.early_exit.schedules.check.passes import alive_activations
from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Interleaved,
    OneFOneB,
    Tuning,
    ZeroBubbleH1,
    max_fills,
)
from tests.helpers.pipeline_schedules import (
    GOLDEN,
    SMALL,
    filled,
    generators,
    limits,
    num_ranks,
    overfilled,
    ratios,
)


@pytest.mark.parametrize("name", SMALL)
def test_small_schedules_are_as_they_were(name):
    assert SMALL[name].build().to_csv() == (GOLDEN / f"{name}.csv").read_text()


@settings(max_examples=60)
@given(generators)
def test_every_list_is_valid(generator):
    """No deadlock with any kind of sends, and no more activations alive than promised."""
    schedule = with_communication(generator.build())
    assert schedule.computations == generator.build()
    for sends in ("blocking", "batched", "buffered"):
        check(schedule, activation_limits=limits(generator), sends=sends)


@settings(max_examples=40)
@given(generators)
def test_promised_activations_are_reached(generator):
    """The promise is no excuse: it is the very number, where there are enough microbatches."""
    assume(generator.num_microbatches >= generator.num_ranks)
    ranks = generator.build().ranks
    assert [max(alive_activations(rank), default=0) for rank in ranks] == limits(generator)


@given(num_ranks, ratios)
def test_number_of_fills_is_the_papers(ranks, ratio):
    exact = (ranks - 1) * ratio / (1 + ratio)
    assert max_fills(ranks, ratio) == pytest.approx(exact, abs=1)
    # Where rounding leaves no doubt.
    if abs(exact - round(exact)) > 1e-3:
        assert max_fills(ranks, ratio) == floor(exact)


def test_number_of_fills_where_backward_takes_twice_as_long():
    assert [max_fills(ranks, 2.0) for ranks in (1, 4, 8, 16)] == [0, 2, 4, 10]
    assert max_fills(5, 1 / 3) == 1


@settings(max_examples=40)
@given(filled())
def test_fills_run_where_the_paper_says(generator):
    ranks, ratio = generator.num_ranks, generator.backward_forward_ratio
    most = max_fills(ranks, ratio)
    done = generator.build().actions

    def stages(kind, microbatch):
        return [s for s in range(ranks) if Action(s, kind, microbatch) in done]

    for i in range(1, generator.num_warmup_fills + 1):
        fill = Microbatch(i - 1, "w")
        assert stages("F", fill) == stages("B", fill) == list(range(most + 1 - i))
    for i in range(1, generator.num_cooldown_fills + 1):
        fill = Microbatch(i - 1, "c")
        assert stages("F", fill) == list(range(ranks))
        depth = ranks - i * (1 / ratio + 1)
        assert len(stages("B", fill)) == pytest.approx(depth, abs=1.001)
        assert stages("B", fill) == list(range(ranks - len(stages("B", fill)), ranks))
        assert len(stages("B", fill)) >= 1


@settings(max_examples=40)
@given(overfilled())
def test_a_fill_of_the_warm_up_ends_on_a_stage_with_an_exit(generator):
    depths = generator.warmup_depths
    assert len(depths) == generator.num_warmup_fills
    assert all(
        depth - 1 in generator.exit_stages and depth < generator.num_ranks for depth in depths
    )
    assert list(depths) == sorted(depths, reverse=True)


def test_without_fills_it_is_1f1b():
    plain = OneFOneB(num_ranks=5, num_microbatches=7)
    none = FilledOneFOneB(
        num_ranks=5,
        num_microbatches=7,
        backward_forward_ratio=2.0,
        num_warmup_fills=0,
        num_cooldown_fills=0,
    )
    assert none.build() == plain.build()


def test_interleaving_one_chunk_is_1f1b_with_a_longer_warmup():
    interleaved = Interleaved(num_ranks=2, num_microbatches=4, num_chunks=1)
    assert str(interleaved.build().ranks[0][3]) == "0B0"
    assert interleaved.activation_limit(0) == 3


def test_messages_between_two_ranks_of_a_ring_have_one_order():
    """With two ranks, states and gradients of both chunks travel on the same pair."""
    schedule = with_communication(
        Interleaved(num_ranks=2, num_microbatches=4, num_chunks=2).build()
    )
    kinds = {action.kind for action in schedule.ranks[0]}
    assert {"SF", "RF", "SB", "RB"} <= kinds
    check(schedule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneFOneB(num_ranks=0, num_microbatches=1), "num_ranks 0 is out of range"),
        (lambda: ZeroBubbleH1(num_ranks=1, num_microbatches=0), "num_microbatches 0 is out of"),
        (
            lambda: Interleaved(num_ranks=4, num_microbatches=6, num_chunks=2),
            "num_microbatches 6 is out of range, allowed: multiples of the 4 ranks",
        ),
        (
            lambda: Interleaved(num_ranks=1, num_microbatches=6, num_chunks=2),
            "num_ranks 1 is out of range, allowed: 2 or more",
        ),
        (
            lambda: FilledOneFOneB(
                num_ranks=4, num_microbatches=6, backward_forward_ratio=2.0, num_warmup_fills=4
            ),
            "num_warmup_fills 4 is out of range, allowed: 0 to 3 with 4 stages",
        ),
        (
            lambda: FilledOneFOneB(num_ranks=4, num_microbatches=6, backward_forward_ratio=0.0),
            "backward_forward_ratio 0.0 is out of range, allowed: 0.01 to 100",
        ),
        (
            lambda: Tuning(num_ranks=4, num_microbatches=6, exit_stages=frozenset({4})),
            "exit_stages 4 is out of range, allowed: 0 to 3",
        ),
        (
            lambda: Tuning(num_ranks=4, num_microbatches=6, exit_stages=frozenset()),
            "exit_stages: there is none",
        ),
    ],
)
def test_generators_say_what_they_allow(make, message):
    with pytest.raises(ValueError, match=message):
        make()
