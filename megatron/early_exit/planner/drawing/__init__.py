"""Timelines as text, and in files whose ending says what kind of picture they are."""

from pathlib import Path

from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.page import PAGE_SUFFIX, draw_page
from megatron.early_exit.planner.drawing.picture import PICTURE_SUFFIXES, draw_picture
from megatron.early_exit.planner.simulation.timeline import Timeline

_SUFFIXES = (*PICTURE_SUFFIXES, PAGE_SUFFIX)


def check_timeline_file(path: Path) -> None:
    """Find out early whether `write_timeline` can write a file.

    Raises:
        ValueError: the name has no known ending, or there is no such folder.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--timeline {path} has no known ending, allowed: {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--timeline {path}: there is no folder {path.parent}")


def write_timeline(timeline: Timeline, path: Path, title: str, extras: Extras) -> None:
    """Draw a timeline as what the file's ending says.

    Raises:
        ValueError: see `check_timeline_file`, `draw_picture` and `draw_page`.
    """
    check_timeline_file(path)
    if path.suffix == PAGE_SUFFIX:
        draw_page(timeline, path, title, extras)
    else:
        draw_picture(timeline, path, title, extras=extras)
