"""Timelines as text and as pictures."""

import struct
from dataclasses import replace

import pytest

from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.picture import draw_picture
from megatron.early_exit.planner.drawing.text import draw_text, seconds_text
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.planner.simulation.timeline import Timeline
from megatron.early_exit.schedules.generators import FilledOneFOneB, OneFOneB, ZeroBubbleH1


@pytest.fixture
def filled() -> Timeline:
    schedule = FilledOneFOneB(num_ranks=4, num_microbatches=6, backward_forward_ratio=2.0)
    return simulate(schedule.build(), CostModel.even(4, 1e-3, 2e-3))


def test_text_of_a_small_step():
    schedule = OneFOneB(num_ranks=2, num_microbatches=2).build()
    timeline = simulate(schedule, CostModel.even(2, 1, 2))
    assert draw_text(timeline, width=36).splitlines() == [
        "step 9 s, bubble 33.3% of all time",
        "F --- forward, B === backward, W ~~~ weight gradient, L +++ exits only, ... idle",
        "rank 0  |F0--F1--........B0======....B1======| busy  67%",
        "        |^^^^                        ^^^^^^^^|",
        "rank 1  |....F0--B0======F1--B1======........| busy  67%",
        "        |    ^^^^^^^^^^^^^^^^^^^^^^^^        |",
        "^: on the critical path",
    ]


def test_text_names_fills_and_memory(filled):
    assert "Fw0" in draw_text(filled, width=120)
    stage = StageCost(forward_s=1, backward_s=2, static_bytes=3e9)
    costs = CostModel(stages=(stage,), transfer_s=())
    schedule = OneFOneB(num_ranks=1, num_microbatches=1).build()
    assert "busy 100%, 3.0 GB" in draw_text(simulate(schedule, costs))


def test_narrow_text_keeps_its_width(filled):
    rows = [line for line in draw_text(filled, width=20).splitlines() if line.startswith("rank")]
    assert {line.index("| busy") for line in rows} == {29}


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.0, "12 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 us"), (0.0, "0 ns")]
)
def test_seconds_have_a_unit_that_suits_them(seconds, text):
    assert seconds_text(seconds) == text


def test_png_is_a_picture(filled, tmp_path):
    draw_picture(filled, tmp_path / "step.png", title="Filled", width_inches=10)
    content = (tmp_path / "step.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1500
    assert 300 < height < 700


def test_svg_is_the_same_each_time(filled, tmp_path):
    for name in ("one.svg", "two.svg"):
        draw_picture(filled, tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    # The colours of a fill's passes, and of the critical path.
    for color in ("#ffd27f", "#f2a65a", "#c0392b"):
        assert color in one


def test_pictures_show_only_what_is_there(tmp_path):
    schedule = ZeroBubbleH1(num_ranks=2, num_microbatches=2).build()
    draw_picture(simulate(schedule, CostModel.even(2, 1, 2, 1)), tmp_path / "zero.svg")
    picture = (tmp_path / "zero.svg").read_text()
    assert "weight gradient" in picture
    assert "of a fill" not in picture


def test_what_cannot_be_drawn_is_refused(filled, tmp_path):
    with pytest.raises(ValueError, match=r"step.gif has no known ending, allowed: .png, .svg"):
        draw_picture(filled, tmp_path / "step.gif")
    nothing = Timeline(ranks=((),), peak_bytes=(0,), kept_bytes=(0,))
    with pytest.raises(ValueError, match=r"a step of 0.0 s cannot be drawn"):
        draw_picture(nothing, tmp_path / "step.png")
    with pytest.raises(ValueError, match=r"a step of 0.0 s in 100 characters cannot be drawn"):
        draw_text(nothing)


def test_extras_follow_from_costs(tmp_path):
    plain = StageCost(forward_s=1, backward_s=2, static_bytes=5e9, activation_bytes=1e9)
    exits = replace(plain, backward_s=3, local_backward_s=1, backward_extra_bytes=5e8)
    costs = CostModel(stages=(exits, plain), transfer_s=(0,))
    timeline = simulate(OneFOneB(num_ranks=2, num_microbatches=3).build(), costs)
    extras = Extras.of(timeline, costs, "Drawn: 3 of 9 microbatches.", update_s=2)
    for rank, peak in zip(extras.memory, timeline.peak_bytes, strict=True):
        assert max(size for _, size in rank) == peak
        # Weights alone are left, until the update has ended.
        assert rank[0] == (0, 5e9)
        assert rank[-1] == (timeline.step_s + 2, 5e9)
        assert [time for time, _ in rank] == sorted(time for time, _ in rank)
    # The first stage keeps two microbatches, and an exit's logits come on top of them.
    assert max(size for _, size in extras.memory[0]) == 7.5e9
    parts = {extras.exit_part_s(timed) for timed in timeline.ranks[0]}
    assert parts == {0, 1}
    assert {extras.exit_part_s(timed) for timed in timeline.ranks[1]} == {0}
    draw_picture(timeline, tmp_path / "more.svg", extras=extras)
    picture = (tmp_path / "more.svg").read_text()
    for text in ("Drawn: 3 of 9 microbatches.", "update", "memory", "exits in a backward"):
        assert f"<!-- {text} -->" in picture
    draw_picture(timeline, tmp_path / "less.svg")
    assert "<!-- memory -->" not in (tmp_path / "less.svg").read_text()
