"""What the step of a plan consists of, and the memory of its ranks, as tables."""

from textwrap import indent

from megatron.early_exit.planner.drawing.text import aligned, seconds_text
from megatron.early_exit.planner.search.breakdown import (
    MEMORY_KINDS,
    TIME_KINDS,
    memory_parts,
    step_parts,
)
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest

# More ranks than these are in the JSON.
_MOST_RANKS = 8


def time_table(plan: Plan, request: PlanRequest) -> str:
    """A line for each kind of time in the step."""
    step_s = plan.prediction.step_s
    rows = [
        (seconds_text(seconds), f"{seconds / step_s:.1%}", TIME_KINDS[kind])
        for kind, seconds in step_parts(plan, request).items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"    {time:>{widths[0]}}  {share:>{widths[1]}}  {what}" for time, share, what in rows
    )


def memory_table(plan: Plan) -> str:
    """A line for each rank with its kinds of memory; of many ranks the first, the fullest and the
    last."""
    parts = memory_parts(plan)
    ranks = list(range(len(parts)))
    if len(parts) > _MOST_RANKS:
        fullest = max(ranks, key=lambda rank: sum(parts[rank].values()))
        ranks = sorted({0, fullest, len(parts) - 1})
    rows = [["rank", *MEMORY_KINDS, "together"]]
    for rank in ranks:
        sizes = [*parts[rank].values(), sum(parts[rank].values())]
        rows.append([str(rank), *(f"{size / 1e9:.1f} GB" for size in sizes)])
    return indent(aligned(rows), "    ")
