"""Timelines, tables and times as text, for terminals and for messages."""

from collections.abc import Sequence

from megatron.early_exit.planner.simulation.timeline import Timeline
from megatron.early_exit.schedules.actions import Kind

_FILL: dict[Kind, str] = {"F": "-", "B": "=", "I": "=", "W": "~", "L": "+"}
_IDLE, _CRITICAL = ".", "^"

LEGEND = "F --- forward, B === backward, W ~~~ weight gradient, L +++ exits only, ... idle"
"""What the characters mean."""


def draw_text(timeline: Timeline, width: int = 100) -> str:
    """Draw a row of characters for each rank, with the critical path marked below it.

    Args:
        timeline: what to draw.
        width: characters of the whole step.

    Raises:
        ValueError: the width is too small, or nothing takes any time.
    """
    if width < 10 or timeline.step_s <= 0:
        raise ValueError(
            f"a step of {timeline.step_s} s in {width} characters cannot be drawn, allowed: "
            "above 0 s, 10 characters or more"
        )
    per_second = width / timeline.step_s
    critical = set(timeline.critical_path)
    lines = [
        f"step {seconds_text(timeline.step_s)}, bubble {timeline.bubble_fraction:.1%} of all time",
        LEGEND,
    ]
    for rank, actions in enumerate(timeline.ranks):
        row, marks = [_IDLE] * width, [" "] * width
        for timed in actions:
            start, end = round(timed.start_s * per_second), round(timed.end_s * per_second)
            label = f"{timed.action.kind}{timed.action.microbatch}"[: end - start]
            row[start:end] = label.ljust(end - start, _FILL[timed.action.kind])
            if timed.action in critical:
                marks[start:end] = _CRITICAL * (end - start)
        busy = timeline.busy_s[rank] / timeline.step_s
        peak = timeline.peak_bytes[rank]
        memory = f", {peak / 1e9:.1f} GB" if peak else ""
        lines.append(f"rank {rank:<3}|{''.join(row)}| busy {busy:4.0%}{memory}")
        lines.append(f"{'':8}|{''.join(marks)}|")
    return "\n".join([*lines, f"{_CRITICAL}: on the critical path"])


def seconds_text(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells as a table whose columns end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
