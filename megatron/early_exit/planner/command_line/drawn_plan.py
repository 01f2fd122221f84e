"""The schedule of a plan as a picture: as many of its microbatches as can be told apart."""

from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.planner.simulation.timeline import Timeline
from megatron.early_exit.schedules.check import build_proved

# For each rank, unless another number is asked for.
_DRAWN_PER_RANK = 4


def draw_plan(plan: Plan, num_microbatches: int | None) -> tuple[Timeline, Extras]:
    """What is drawn of a plan's step.

    Args:
        plan: to be drawn.
        num_microbatches: that are wanted; None for a few of each rank.
    """
    candidate, pipeline = plan.costing.candidate, plan.prediction.pipeline
    num_ranks, whole = candidate.layout.num_ranks, candidate.num_microbatches
    number = min(num_microbatches or _DRAWN_PER_RANK * num_ranks, whole)
    if candidate.num_chunks > 1:
        # Those of an interleaved schedule come in groups.
        number = max(number // num_ranks, 1) * num_ranks
    costs = plan.costing.costs
    timeline = simulate(build_proved(plan.costing.generator(number, plan.fills)), costs)
    update_s = plan.prediction.step_s - pipeline.step_s
    part = f"{number} of {whole}" if number < whole else f"all {whole}"
    note = (
        f"Drawn: {part} microbatches, and the update of {seconds_text(update_s)}. "
        f"The whole step: {seconds_text(plan.prediction.step_s)}, bubble "
        f"{pipeline.bubble_fraction:.1%}, at most {max(pipeline.peak_bytes) / 1e9:.1f} GB on a "
        "rank."
    )
    return timeline, Extras.of(timeline, costs, note, update_s)
