"""A timeline as a page to zoom into: one file, which asks for nothing and runs anywhere."""

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from megatron.early_exit.planner.drawing.appearance import (
    EXIT_COLOR,
    MEMORY_COLOR,
    UPDATE_COLOR,
    legend_of,
    name_of,
)
from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.simulation.timeline import Timeline

PAGE_SUFFIX = ".html"


def draw_page(timeline: Timeline, path: Path, title: str, extras: Extras | None = None) -> None:
    """Write a page that shows a timeline.

    Args:
        timeline: what to show.
        path: of the file.
        title: of the page.
        extras: what is shown beside the computations.

    Raises:
        ValueError: nothing takes any time.
    """
    if timeline.step_s <= 0:
        raise ValueError(f"a step of {timeline.step_s} s cannot be drawn, allowed: above 0 s")
    parts = files(__package__) / "timeline_page"
    # What ends a script must not stand in the text of one.
    data = json.dumps(page_data(timeline, title, extras or Extras())).replace("<", "\\u003c")
    page = (parts / "timeline.html").read_text(encoding="utf-8")
    for place, text in (
        ("@style@", (parts / "timeline.css").read_text(encoding="utf-8").strip()),
        ("@script@", "\n\n".join(_script(parts / name) for name in ("draw.js", "timeline.js"))),
        ("@data@", data),
    ):
        page = page.replace(place, text)
    path.write_text(page, encoding="utf-8")


def _script(file: Traversable) -> str:
    return file.read_text(encoding="utf-8").strip()


def page_data(timeline: Timeline, title: str, extras: Extras) -> dict[str, object]:
    """What the page's script reads: times in seconds; a computation that another one waited for as
    its rank and its place there."""
    actions = [timed.action for rank in timeline.ranks for timed in rank]
    kinds = legend_of(actions)
    fills = {name_of(action) for action in actions if action.microbatch.role}
    numbers = {name: number for number, name in enumerate(kinds)}
    places = {
        timed.action: (row, index)
        for row, rank in enumerate(timeline.ranks)
        for index, timed in enumerate(rank)
    }
    critical = set(timeline.critical_path)
    return {
        "title": title,
        "summary": extras.note or _summary(timeline),
        "stepSeconds": timeline.step_s,
        "updateSeconds": extras.update_s,
        "memory": extras.memory,
        "colors": {"exit": EXIT_COLOR, "memory": MEMORY_COLOR, "update": UPDATE_COLOR},
        "kinds": [
            {"name": name, "color": color, "isFill": name in fills} for name, color in kinds.items()
        ],
        "ranks": [
            [
                [
                    str(timed.action),
                    numbers[name_of(timed.action)],
                    timed.action.stage,
                    str(timed.action.microbatch),
                    timed.start_s,
                    timed.end_s,
                    None if timed.waited_for is None else places[timed.waited_for],
                    int(timed.action in critical),
                    extras.exit_part_s(timed),
                ]
                for timed in rank
            ]
            for rank in timeline.ranks
        ],
    }


def _summary(timeline: Timeline) -> str:
    text = (
        f"Step {seconds_text(timeline.step_s)}, bubble {timeline.bubble_fraction:.1%} of all time"
    )
    peak = max(timeline.peak_bytes)
    return text + (f", at most {peak / 1e9:.1f} GB on a rank." if peak else ".")
