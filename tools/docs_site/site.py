"""Builds the site from its sources, and finds what its builder would not complain about."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.docs_site.flags_page import REPOSITORY
from tools.docs_site.sources import write_sources

CONFIGURATION = REPOSITORY / "mkdocs.yml"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def build(folder: Path, with_docstrings: bool = True) -> Path:
    """Build the site; returns its folder.

    Args:
        folder: for the sources and the site, `site_sources` and `site`.
        with_docstrings: fill the pages of the Python interface, which takes most of the time.

    Raises:
        ValueError: a link leads nowhere, a page or an anchor is missing, or a page is not in the
            navigation; the message has all that was found.
    """
    sources, site = folder / "site_sources", folder / "site"
    write_sources(sources)
    configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    faults = list(navigation_faults(configuration["nav"], sources))
    if faults:
        raise ValueError("; ".join(faults))
    # The file's own folders are relative to itself, and so are those of the file that is written.
    configuration.update(docs_dir=sources.name, site_dir=site.name)
    search, docstrings = configuration["plugins"]
    docstrings["mkdocstrings"]["handlers"]["python"]["paths"] = [str(REPOSITORY)]
    configuration["plugins"] = [search, docstrings] if with_docstrings else [search]
    written = folder / CONFIGURATION.name
    written.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(
        [*command, "--config-file", str(written)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = _COLOURS.sub("", done.stdout + done.stderr).partition("Traceback")[0]
        raise ValueError(f"the site cannot be built:\n{said}")
    return site


def navigation_faults(navigation: list[Any], sources: Path) -> Iterator[str]:
    """What pages the navigation lacks, and which of its pages there are not."""
    named = list(_pages(navigation))
    there = {str(path.relative_to(sources)) for path in sources.rglob("*.md")}
    for page in sorted(there - set(named)):
        yield f"{page} is not in the navigation of {CONFIGURATION.name}"
    for page in sorted(set(named) - there):
        yield f"{CONFIGURATION.name} names {page}, which does not exist"


def _pages(navigation: Any) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    else:
        for one in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from _pages(one)
