"""A timeline as a picture, like the figures of the papers on pipeline schedules."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.pipeline.actions import Kind
from megatron.early_exit.pipeline.simulation.text_drawing import seconds_text
from megatron.early_exit.pipeline.simulation.timeline import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

_COLORS: dict[Kind, str] = {
    "F": "#7fb2e5",
    "B": "#8fcb8f",
    "I": "#8fcb8f",
    "W": "#cfe8b5",
    "L": "#d9b3e6",
}
_NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "L": "exits only",
}
_FILLS = {"F": "#ffd27f", "B": "#f2a65a"}
_CRITICAL = "#c0392b"
_SUFFIXES = (".png", ".svg")
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
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"picture {path} has no known ending, allowed: {', '.join(_SUFFIXES)}")
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


def _color(timed: TimedAction) -> str:
    kind = timed.action.kind
    return _FILLS[kind] if timed.action.microbatch.role else _COLORS[kind]


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
    axes.barh(
        rank,
        seconds,
        left=timed.start_s,
        height=0.8,
        color=_color(timed),
        alpha=max(1 - 0.25 * chunk, 0.25),
    )
    axes.barh(
        rank,
        seconds,
        left=timed.start_s,
        height=0.8,
        fill=False,
        edgecolor=_CRITICAL if is_critical else "#555555",
        linewidth=1.8 if is_critical else 0.5,
        zorder=3 if is_critical else 2,
    )
    if seconds >= smallest_labelled_s:
        middle = timed.start_s + seconds / 2
        label = str(timed.action.microbatch)
        axes.text(middle, rank, label, ha="center", va="center", fontsize=7, zorder=4)


def _legend(timeline: Timeline) -> "list[Patch]":
    from matplotlib.patches import Patch

    shown = [timed.action for rank in timeline.ranks for timed in rank]
    kinds = {action.kind for action in shown if not action.microbatch.role}
    fills = {action.kind for action in shown if action.microbatch.role}
    patches = [Patch(color=_COLORS[kind], label=_NAMES[kind]) for kind in _NAMES if kind in kinds]
    patches += [
        Patch(color=color, label=f"{_NAMES[kind]} of a fill")
        for kind, color in _FILLS.items()
        if kind in fills
    ]
    outline = Patch(fill=False, edgecolor=_CRITICAL, linewidth=1.8, label="critical path")
    return [*patches, outline]
