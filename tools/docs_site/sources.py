"""The site's sources: `docs/`, the documents beside the code, and the pages that are generated."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tools.docs_site.flags_page import REPOSITORY, flags_page
from tools.docs_site.python_pages import python_pages

DOCS = "docs"
FLAGS_PAGE = "reference/flags.md"
DOCUMENTS = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "examples/ee_training/README.md": "examples/ee_training.md",
    "examples/ee_tuning/README.md": "examples/ee_tuning.md",
    "examples/serving/README.md": "examples/serving.md",
}
"""Documents that are kept beside what they are about, and their places in the site."""
_HOME = {"README.md": "index.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
_FENCE = re.compile(r"^ *```")
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def generated_pages() -> list[str]:
    """Paths in the site's sources of the pages that no file of the repository has."""
    return [FLAGS_PAGE, *python_pages()]


def write_sources(folder: Path, repository: Path = REPOSITORY) -> None:
    """Write what the site is built from.

    Args:
        folder: for the files; it is emptied first.
        repository: whose documents they are.

    Raises:
        ValueError: a document has a link to a file that there is not. (Whether a page has the
            part that a link asks for is checked when the site is built.)
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(repository / DOCS, folder)
    pages = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.md")
    }
    origins = {page: f"{DOCS}/{page}" for page in pages}
    for origin, page in DOCUMENTS.items():
        pages[page], origins[page] = (repository / origin).read_text(encoding="utf-8"), origin
    dead: list[str] = []
    for page, text in pages.items():
        text = "".join(_with_links(text, origins[page], page, repository, folder, dead))
        _write(folder / page, _with_pictures(text, page, folder))
    if dead:
        raise ValueError("; ".join(dead))
    for page, text in {FLAGS_PAGE: flags_page(), **python_pages()}.items():
        _write(folder / page, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _with_links(
    text: str, origin: str, page: str, repository: Path, folder: Path, dead: list[str]
) -> Iterator[str]:
    """The pieces of a document, with links as its place in the site needs them; those that lead
    nowhere are told of in `dead`."""

    def moved(found: re.Match[str]) -> str:
        mark, name, target, anchor = found.groups(default="")
        if ":" in target:
            return found[0]
        wanted = os.path.normpath(PurePosixPath(origin).parent / target)
        place, source = _place(wanted), repository / wanted
        if not source.exists() and place not in generated_pages():
            dead.append(f"{origin} has a link to {target}, which does not exist")
            return str(found[0])
        if place is None:
            if source.is_dir():
                return str(name)
            place = f"files/{wanted}"
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / place)
        there = os.path.relpath(place, PurePosixPath(page).parent)
        return f"{mark}[{name}]({there}{anchor})"

    # A link may go over the end of a line, so that text between two blocks of code is one piece.
    piece, is_code = "", False
    for line in text.splitlines(keepends=True):
        if _FENCE.match(line):
            yield piece if is_code else _LINK.sub(moved, piece)
            yield line
            piece, is_code = "", not is_code
        else:
            piece += line
    yield piece if is_code else _LINK.sub(moved, piece)


def _place(path: str) -> str | None:
    """Where a file of the repository is in the site's sources; None if it is not."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return {**DOCUMENTS, **_HOME}.get(path)


def _with_pictures(text: str, page: str, folder: Path) -> str:
    """A page whose diagrams are pictures: a browser would fetch what draws them."""
    from mmdr import Diagram

    number = 0

    def drawn(found: re.Match[str]) -> str:
        nonlocal number
        number += 1
        picture = f"diagrams/{PurePosixPath(page).stem}_{number}.svg"
        _write(folder / picture, Diagram(found[1]).svg())
        return f"![Diagram]({os.path.relpath(picture, PurePosixPath(page).parent)})"

    return _MERMAID.sub(drawn, text)
