"""A timeline as a page to zoom into: one file, which asks for nothing and runs anywhere."""

import json
from importlib.resources import files
from pathlib import Path

from megatron.early_exit.planner.drawing.appearance import legend_of, name_of
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.simulation.timeline import Timeline

PAGE_SUFFIX = ".html"


def draw_page(timeline: Timeline, path: Path, title: str) -> None:
    """Write a page that shows a timeline.

    Args:
        timeline: what to show.
        path: of the file.
        title: of the page.

    Raises:
        ValueError: nothing takes any time.
    """
    if timeline.step_s <= 0:
        raise ValueError(f"a step of {timeline.step_s} s cannot be drawn, allowed: above 0 s")
    parts = files(__package__) / "timeline_page"
    # What ends a script must not stand in the text of one.
    data = json.dumps(page_data(timeline, title)).replace("<", "\\u003c")
    page = (parts / "timeline.html").read_text(encoding="utf-8")
    for place, text in (
        ("@style@", (parts / "timeline.css").read_text(encoding="utf-8").strip()),
        ("@script@", (parts / "timeline.js").read_text(encoding="utf-8").strip()),
        ("@data@", data),
    ):
        page = page.replace(place, text)
    path.write_text(page, encoding="utf-8")


def page_data(timeline: Timeline, title: str) -> dict[str, object]:
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
        "summary": _summary(timeline),
        "stepSeconds": timeline.step_s,
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
