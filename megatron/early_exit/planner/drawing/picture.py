"""A timeline as a picture, like the figures of the papers on pipeline schedules."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.planner.drawing.appearance import CRITICAL_COLOR, color_of, legend_of
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.simulation.timeline import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

PICTURE_SUFFIXES = (".png", ".svg")
# Labels in narrower boxes would run into each other.
_SMALLEST_LABELLED_INCHES = 0.16


def draw_picture(timeline: Timeline, path: Path, title: str = "", width_inches: float = 12) -> None:
    """Write a picture of a timeline, with filled work in colours of its own and the critical path
    outlined.

    Args:
        timeline: what to draw.
        path: of the file, which ends with .png or .svg.
        title: above the picture, before the step time.
        width_inches: of the picture.

    Raises:
        ValueError: the file's name has another ending, or nothing takes any time.
    """
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(
            f"picture {path} has no known ending, allowed: {', '.join(PICTURE_SUFFIXES)}"
        )
    if timeline.step_s <= 0:
        raise ValueError(f"a step of {timeline.step_s} s cannot be drawn, allowed: above 0 s")
    # Only those who draw pay for its import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    num_ranks = len(timeline.ranks)
    figure = Figure(figsize=(width_inches, 1.3 + 0.42 * num_ranks), layout="constrained")
    axes = figure.add_subplot()
    critical = set(timeline.critical_path)
    smallest = timeline.step_s * _SMALLEST_LABELLED_INCHES / width_inches
    for rank, actions in enumerate(timeline.ranks):
        for timed in actions:
            _draw_action(axes, rank, timed, num_ranks, timed.action in critical, smallest)
    # Room for the outline of what ends last.
    axes.set_xlim(0, timeline.step_s * 1.003)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.xaxis.set_major_formatter(lambda seconds, _: seconds_text(seconds) if seconds else "0")
    axes.spines[["top", "right"]].set_visible(False)
    figures = f"step {seconds_text(timeline.step_s)}, bubble {timeline.bubble_fraction:.1%}"
    axes.set_title(f"{title}: {figures}" if title else figures, loc="left", fontsize=10)
    figure.legend(
        handles=_legend(timeline), loc="outside lower left", ncols=8, frameon=False, fontsize=8
    )
    # Without a date and random names, the same timeline gives the same file.
    with rc_context({"svg.hashsalt": "megatron.early_exit"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw_action(
    axes: "Axes",
    rank: int,
    timed: TimedAction,
    num_ranks: int,
    is_critical: bool,
    smallest_labelled_s: float,
) -> None:
    seconds = timed.end_s - timed.start_s
    # Later chunks of a rank are paler.
    chunk = timed.action.stage // num_ranks
    draw_box = partial(axes.barh, rank, seconds, left=timed.start_s, height=0.8)
    draw_box(color=color_of(timed.action), alpha=max(1 - 0.25 * chunk, 0.25))
    draw_box(
        fill=False,
        edgecolor=CRITICAL_COLOR if is_critical else "#555555",
        linewidth=1.8 if is_critical else 0.5,
        zorder=3 if is_critical else 2,
    )
    if seconds >= smallest_labelled_s:
        middle = timed.start_s + seconds / 2
        label = str(timed.action.microbatch)
        axes.text(middle, rank, label, ha="center", va="center", fontsize=7, zorder=4)


def _legend(timeline: Timeline) -> "list[Patch]":
    from matplotlib.patches import Patch

    shown = legend_of([timed.action for rank in timeline.ranks for timed in rank])
    patches = [Patch(color=color, label=name) for name, color in shown.items()]
    outline = Patch(fill=False, edgecolor=CRITICAL_COLOR, linewidth=1.8, label="critical path")
    return [*patches, outline]
