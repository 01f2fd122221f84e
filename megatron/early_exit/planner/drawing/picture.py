"""A timeline as a picture, like the figures of the papers on pipeline schedules."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.planner.drawing.appearance import (
    CRITICAL_COLOR,
    EXIT_COLOR,
    MEMORY_COLOR,
    UPDATE_COLOR,
    color_of,
    legend_of,
)
from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.simulation.timeline import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

PICTURE_SUFFIXES = (".png", ".svg")
# Labels in narrower boxes would run into each other.
_SMALLEST_LABELLED_INCHES = 0.16
_SMALLEST_OUTLINED_INCHES = 0.09
# Of the stripe in a backward whose row is one high.
_EXIT_HEIGHT = 0.12


def draw_picture(
    timeline: Timeline,
    path: Path,
    title: str = "",
    width_inches: float = 12,
    extras: Extras | None = None,
) -> None:
    """Write a picture of a timeline, with filled work in colours of its own and the critical path
    outlined.

    Args:
        timeline: what to draw.
        path: of the file, which ends with .png or .svg.
        title: above the picture, before the step time.
        width_inches: of the picture.
        extras: what is shown beside the computations.

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

    extras = extras or Extras()
    num_ranks = len(timeline.ranks)
    row_inches = 0.62 if extras.memory else 0.42
    figure = Figure(figsize=(width_inches, 1.3 + row_inches * num_ranks), layout="constrained")
    axes = figure.add_subplot()
    critical = set(timeline.critical_path)
    whole_s = timeline.step_s + extras.update_s
    pen = _Pen(axes, num_ranks, whole_s / width_inches, extras)
    for rank, actions in enumerate(timeline.ranks):
        for timed in actions:
            pen.draw_action(rank, timed, timed.action in critical)
    pen.draw_update(timeline.step_s)
    pen.draw_memory()
    # Room for the outline of what ends last.
    axes.set_xlim(0, whole_s * 1.003)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.xaxis.set_major_formatter(lambda seconds, _: seconds_text(seconds) if seconds else "0")
    axes.spines[["top", "right"]].set_visible(False)
    figures = f"step {seconds_text(timeline.step_s)}, bubble {timeline.bubble_fraction:.1%}"
    if extras.note:
        figures = f"{title}\n{extras.note}" if title else extras.note
    elif title:
        figures = f"{title}: {figures}"
    axes.set_title(figures, loc="left", fontsize=10)
    legend = _legend(timeline, extras)
    figure.legend(handles=legend, loc="outside lower left", ncols=9, frameon=False, fontsize=8)
    # Without a date and random names, the same timeline gives the same file.
    with rc_context({"svg.hashsalt": "megatron.early_exit"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


@dataclass(frozen=True)
class _Pen:
    """Draws into the rows of the ranks.

    Attributes:
        axes: to draw into.
        num_ranks: rows of them.
        seconds_per_inch: of the picture's width.
        extras: what is shown beside the computations.
    """

    axes: "Axes"
    num_ranks: int
    seconds_per_inch: float
    extras: Extras

    @property
    def _height(self) -> float:
        """Of a computation's box, whose row also has its rank's memory."""
        return 0.5 if self.extras.memory else 0.8

    def _middle(self, rank: int) -> float:
        return rank - (0.4 - self._height / 2)

    def draw_action(self, rank: int, timed: TimedAction, is_critical: bool) -> None:
        """Draw the box of a computation."""
        seconds, height, middle = timed.end_s - timed.start_s, self._height, self._middle(rank)
        inches = seconds / self.seconds_per_inch
        # Later chunks of a rank are paler.
        chunk = timed.action.stage // self.num_ranks
        draw_box = partial(self.axes.barh, left=timed.start_s)
        draw_box(
            middle,
            seconds,
            height=height,
            color=color_of(timed.action),
            alpha=max(1 - 0.25 * chunk, 0.25),
        )
        exit_s = self.extras.exit_part_s(timed)
        if exit_s:
            low = middle + height / 2 - _EXIT_HEIGHT / 2
            draw_box(low, exit_s, height=_EXIT_HEIGHT, color=EXIT_COLOR, zorder=2.5)
        if inches < _SMALLEST_OUTLINED_INCHES:
            # Outlines would be all that is seen.
            if is_critical:
                high = middle - height / 2
                draw_box(high, seconds, height=_EXIT_HEIGHT / 2, color=CRITICAL_COLOR, zorder=3)
            return
        draw_box(
            middle,
            seconds,
            height=height,
            fill=False,
            edgecolor=CRITICAL_COLOR if is_critical else "#555555",
            linewidth=1.8 if is_critical else 0.5,
            zorder=3 if is_critical else 2,
        )
        if inches >= _SMALLEST_LABELLED_INCHES:
            center = timed.start_s + seconds / 2
            label = str(timed.action.microbatch)
            self.axes.text(center, middle, label, ha="center", va="center", fontsize=7, zorder=4)

    def draw_update(self, start_s: float) -> None:
        """Draw the update of all ranks."""
        if self.extras.update_s:
            for rank in range(self.num_ranks):
                self.axes.barh(
                    self._middle(rank),
                    self.extras.update_s,
                    left=start_s,
                    height=self._height,
                    color=UPDATE_COLOR,
                )

    def draw_memory(self) -> None:
        """Draw the memory of each rank below its computations, all on one scale."""
        if not self.extras.memory:
            return
        most = max(size for rank in self.extras.memory for _, size in rank)
        for rank, changes in enumerate(self.extras.memory):
            times = [time for time, _ in changes]
            low, height = rank + 0.42, 0.28
            sizes = [low - height * size / most for _, size in changes]
            self.axes.fill_between(times, sizes, low, step="post", color=MEMORY_COLOR, linewidth=0)
            peak = max(size for _, size in changes)
            label = f"{peak / 1e9:.1f} GB"
            self.axes.text(
                1.005,
                low - height / 2,
                label,
                va="center",
                fontsize=7,
                transform=self.axes.get_yaxis_transform(),
            )


def _legend(timeline: Timeline, extras: Extras) -> "list[Patch]":
    from matplotlib.patches import Patch

    shown = legend_of([timed.action for rank in timeline.ranks for timed in rank])
    if any(extras.exit_part_s(timed) for rank in timeline.ranks for timed in rank):
        shown["exits in a backward"] = EXIT_COLOR
    if extras.update_s:
        shown["update"] = UPDATE_COLOR
    if extras.memory:
        shown["memory"] = MEMORY_COLOR
    patches = [Patch(color=color, label=name) for name, color in shown.items()]
    outline = Patch(fill=False, edgecolor=CRITICAL_COLOR, linewidth=1.8, label="critical path")
    return [*patches, outline]
