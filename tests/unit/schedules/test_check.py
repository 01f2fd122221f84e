"""What is wrong with a schedule is found, and explained with a picture."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.check import ScheduleError, build_proved, check
from megatron.early_exit.schedules.check.fault import draw_grid
from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.generators import OneFOneB, ZeroBubbleH1
from megatron.early_exit.schedules.schedule import Schedule

# Two stages and two microbatches, computations only.
GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def explain(text: str, **options: object) -> str:
    with pytest.raises(ScheduleError) as caught:
        check(Schedule.from_csv(text), **options)
    return str(caught.value)


def test_good_schedule_passes():
    check(Schedule.from_csv(GOOD), activation_limits=[2, 1])


def test_explanation_draws_the_grid_with_the_faulty_step_marked():
    assert explain(GOOD.replace("1F0,1B0", "1B0,1F0")) == (
        "1B0 comes before 1F0, whose result it needs:\n"
        "  step    0     1    2    3\n"
        "rank 0  0F0   0F1  0B0  0B1\n"
        "rank 1 >1B0< >1F0< 1F1  1B1"
    )


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        ("0F1", "1F1", r"1F1 is on rank 0, allowed: rank 1"),
        ("0F1", "0F0", r"0F0 happens twice, allowed: once"),
        ("1F0,1B0,", "1B0,", r"1B0 needs 1F0, which is missing"),
        ("0F0,0F1,0B0", "0F1", r"microbatch 0 runs forward on stages \[1\], allowed: the first"),
        (",0B1", "", r"microbatch 1 runs backward on stages \[1\], allowed: \[0, 1\]"),
        ("1B0", "1B0,1I0,1W0", r"microbatch 0 runs backward on stages \[0, 1, 1\]"),
        ("1B0", "1I0", r"microbatch 0 has no weight gradient on stage 1"),
        ("1B0", "1W0,1I0", r"1W0 comes before 1I0, whose result it needs"),
        ("1B0", "1B0,1L0", r"in the exits of stages \[1\], allowed: one of both"),
        ("0F0,0F1,0B0", "0F0,0B0,0F1", None),
        ("1F0,1B0,1F1,1B1", "1F1,1F0,1B0,1B1", None),
        ("0F1,0B0", "0F1,0SF1,0B0", "1B0 has no 1SB0"),
    ],
)
def test_faults_are_explained(found, instead, reason):
    assert found in GOOD
    text = GOOD.replace(found, instead)
    if reason is None:
        check(Schedule.from_csv(text))
    else:
        assert re.search(reason, explain(text))


def test_computations_that_wait_for_each_other_are_found():
    # Stage 0 wants the gradient of 0 before it makes 1, stage 1 wants 1 before it makes that.
    text = "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"
    explained = explain(text)
    assert explained.startswith("these computations wait for each other for ever:")
    assert ">0B0<" in explained
    assert ">1F1<" in explained


COMMUNICATING = "0F0,0SF0,0F1,0SF1,0RB0,0B0,0RB1,0B1\n1RF0,1F0,1B0,1SB0,1RF1,1F1,1B1,1SB1\n"


def test_blocking_sends_that_cross_wait_for_ever():
    """Sends that end at once hide what stops the pipeline where they block."""
    check(Schedule.from_csv(COMMUNICATING), sends="buffered")
    check(Schedule.from_csv(COMMUNICATING), sends="batched")
    explained = explain(COMMUNICATING, sends="blocking")
    assert explained.startswith("with blocking sends these steps wait for each other for ever:")
    assert ">0SF1<" in explained
    assert ">1SB0<" in explained


def test_receives_that_cross_wait_for_ever_with_any_sends():
    text = COMMUNICATING.replace("0F1,0SF1,0RB0", "0RB0,0F1,0SF1")
    crossed = text.replace("1F0,1B0,1SB0,1RF1", "1F0,1RF1,1B0,1SB0")
    for sends in ("blocking", "batched", "buffered"):
        assert ">0RB0<" in explain(crossed, sends=sends)


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        ("1RF0,", "", "1F0 has no 1RF0"),
        ("0SF0,", "", "0F0 has no 0SF0"),
        ("0F0,0SF0", "0SF0,0F0", "0SF0 comes before 0F0, whose result it sends"),
        ("1RF0,1F0", "1F0,1RF0", "1RF0 comes after 1F0, which needs it"),
        ("1B1", "1SF1,1B1", "nothing needs 1SF1"),
        (
            "0F0,0SF0,0F1,0SF1",
            "0F0,0F1,0SF1,0SF0",
            "rank 0 sends to 1RF1 while rank 1 is at 1RF0, allowed: the same order on both ranks",
        ),
    ],
)
def test_faults_of_messages_are_explained(found, instead, reason):
    assert found in COMMUNICATING
    assert explain(COMMUNICATING.replace(found, instead)).startswith(reason)


def test_placing_messages_mends_them():
    mended = with_communication(Schedule.from_csv(COMMUNICATING))
    check(mended, sends="blocking")
    assert mended.computations == Schedule.from_csv(GOOD)


def test_messages_are_not_placed_where_computations_wait_for_ever():
    with pytest.raises(ValueError, match="0B0 waits for ever"):
        with_communication(Schedule.from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"))


def test_too_many_activations_are_found():
    explained = explain(GOOD, activation_limits=[1, 1])
    assert explained.startswith("rank 0 keeps 2 activations, allowed: 1:")
    assert ">0F1<" in explained


def test_what_generators_make_is_proved_once():
    generator = OneFOneB(num_ranks=2, num_microbatches=3)
    schedule = build_proved(generator)
    assert schedule == generator.build()
    assert build_proved(OneFOneB(num_ranks=2, num_microbatches=3)) is schedule


def test_generators_have_to_keep_their_promises():
    class Promising(OneFOneB):
        def activation_limit(self, rank: int) -> int:
            return 1

    with pytest.raises(ScheduleError, match="rank 0 keeps 2 activations, allowed: 1"):
        build_proved(Promising(num_ranks=2, num_microbatches=3))


def test_every_missing_action_is_noticed():
    """Whatever is left out of a list, the rest does not pass for a schedule."""
    for generator in (
        OneFOneB(num_ranks=3, num_microbatches=4),
        ZeroBubbleH1(num_ranks=3, num_microbatches=4),
    ):
        ranks = with_communication(generator.build()).ranks
        for rank, actions in enumerate(ranks):
            for at in range(len(actions)):
                short = (*actions[:at], *actions[at + 1 :])
                with pytest.raises(ScheduleError):
                    check(Schedule((*ranks[:rank], short, *ranks[rank + 1 :])))


def test_long_schedules_are_drawn_around_the_fault():
    schedule = OneFOneB(num_ranks=2, num_microbatches=30).build()
    late = next(i for i, action in enumerate(schedule.ranks[1]) if str(action) == "1F20")
    actions = list(schedule.ranks[1])
    actions[late] = Action.parse("1F3")
    with pytest.raises(ScheduleError) as caught:
        check(Schedule((schedule.ranks[0], tuple(actions))))
    assert ">1F3<" in str(caught.value)
    assert "1F29" not in str(caught.value)


def test_whole_grid():
    assert draw_grid(Schedule.from_csv(GOOD)).splitlines()[0] == "  step   0    1    2    3"


small_actions = st.builds(
    Action,
    st.integers(0, 3),
    st.sampled_from(["F", "B", "I", "W", "L", "SF", "RF", "SB", "RB"]),
    st.builds(Microbatch, st.integers(0, 1), st.sampled_from(["", "w"])),
)
mutations = st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(0, 2), st.integers(0, 99))


@settings(max_examples=200)
@given(st.lists(mutations, min_size=1, max_size=4), st.sampled_from(["blocking", "batched"]))
def test_lists_in_any_disorder_are_explained_or_right(moves, sends):
    """Whatever is moved where, the answer is never another error than the explanation."""
    schedule = with_communication(OneFOneB(num_ranks=3, num_microbatches=4).build())
    ranks = [list(rank) for rank in schedule.ranks]
    for source, at, target, to in moves:
        if ranks[source]:
            action = ranks[source].pop(at % len(ranks[source]))
            ranks[target].insert(to % (len(ranks[target]) + 1), action)
    moved = Schedule(tuple(map(tuple, ranks)))
    try:
        check(moved, sends=sends)
    except ScheduleError as error:
        assert ">" in str(error)  # noqa: PT017
    else:
        assert moved.actions == schedule.actions


@settings(max_examples=200)
@given(st.lists(st.lists(small_actions, max_size=6), min_size=1, max_size=3))
def test_any_lists_are_explained_or_right(ranks):
    try:
        check(Schedule(tuple(map(tuple, ranks))))
    except ScheduleError as error:
        assert ">" in str(error)  # noqa: PT017
