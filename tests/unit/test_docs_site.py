"""The documentation's site: the page of flags, links, navigation, and what it takes to read it."""

from __future__ import annotations

import argparse
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

import megatron.early_exit.inference as inference
from tools.docs_site import flags_page, sources
from tools.docs_site.public_names import PUBLIC
from tools.docs_site.site import build, navigation_faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return flags_page.flags_page()


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and its verbs, except for --help and those that it hides."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                found |= options(verb)
        elif action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
            found |= set(action.option_strings)
    return found


def section(page: str, anchor: str) -> str:
    """What the page says behind a heading of its second level."""
    return page.partition(f"{{#{anchor}}}\n")[2].partition("\n## ")[0]


# --- flags -----------------------------------------------------------------------------------


def test_every_flag_of_training_is_in_the_page(page):
    flags = options(flags_page.training_parser())
    assert {"--exit-layer-nums", "--tune-exit", "--fill-explicit-bubbles"} < flags
    rows = re.findall(r"^\| `(--[\w-]+)`", section(page, "training"), re.MULTILINE)
    assert sorted(rows) == sorted(flags)


def test_every_flag_of_the_exits_is_in_the_guides():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("train.md", "tune.md"))
    flags = options(flags_page.training_parser())
    assert [one for one in flags if not re.search(rf"`(?:[^`\n]* )?{one}[ `]", pages)] == []


@pytest.mark.parametrize("path", flags_page.tool_paths(), ids=lambda path: path.name)
def test_every_flag_of_a_tool_is_in_the_page(page, path):
    text = section(page, path.stem)
    assert text.strip()
    parser = flags_page.tool_parser(path)
    if parser is not None:
        assert [one for one in options(parser) if f"`{one}`" not in text] == []


def test_rows_say_what_is_allowed_and_by_default():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--number", type=int, default=3, help="of things (default: %(default)s)")
    add("--name", choices=("a_b", "c"), required=True, help="one | two")
    add("--sizes", type=float, nargs="+", default=[1.0, 2.0], help="default: %(default)s")
    add("--fast", action=argparse.BooleanOptionalAction, default=True)
    add("--output", type=Path)
    add("--hidden", help=argparse.SUPPRESS)
    assert "\n".join(flags_page._tables(parser, "tool")).splitlines()[2:] == [
        "| `--number` | integer | 3 | of things |",
        "| `--name` | `a_b`, `c` | required | one \\| two |",
        "| `--sizes` | one or more: number | 1.0 2.0 |  |",
        "| `--fast`, `--no-fast` | switch | on |  |",
        "| `--output` | path | none |  |",
    ]


def test_fields_of_requests_have_their_descriptions_and_ranges(page):
    (row,) = re.findall(r"^\| `--early-exit-threshold` .*", section(page, "generate"), re.MULTILINE)
    assert "| 0 to 1 |" in row
    assert "Least confidence" in row


def test_a_tool_that_hides_its_parser_is_refused(tmp_path):
    path = tmp_path / "tool.py"
    path.write_text("def main():\n    ArgumentParser()\n")
    with pytest.raises(ValueError, match=r"tool\.py makes a parser, allowed"):
        flags_page.tool_parser(path)


# --- Python ----------------------------------------------------------------------------------


def test_public_names_are_there():
    modules = [(module, names) for page in PUBLIC.values() for module, names in page.names.items()]
    for module, names in modules:
        assert [one for one in names if not hasattr(import_module(module), one)] == []
    assert set(inference.__all__) == set(dict(modules)["megatron.early_exit.inference"])


# --- the site --------------------------------------------------------------------------------


def test_site_is_built_and_asks_for_nothing_from_elsewhere(tmp_path, page, monkeypatch):
    monkeypatch.setattr(sources, "flags_page", lambda: page)
    site = build(tmp_path, with_docstrings=False)
    for name in ("index.html", "reference/flags.html", "project/contributing.html"):
        text = (site / name).read_text()
        fetched = re.findall(r"<(?:script|img|link rel=.stylesheet.)[^>]*(?:src|href)=.?http", text)
        assert fetched == [], name
    architecture = (site / "architecture.html").read_text()
    assert architecture.count('src="diagrams/architecture_') == 3
    assert 'class="mermaid"' not in architecture


def test_site_with_a_dead_anchor_is_refused(tmp_path, page, monkeypatch):
    monkeypatch.setattr(sources, "flags_page", lambda: f"{page}\n[dead](../gpu.md#none)\n")
    with pytest.raises(ValueError, match="anchor does not exist"):
        build(tmp_path, with_docstrings=False)


def test_pages_outside_of_the_navigation_are_found(tmp_path):
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("# A\n")
    assert list(navigation_faults([{"Start": ["a.md", {"C": "c.md"}]}], tmp_path)) == [
        "b.md is not in the navigation of mkdocs.yml",
        "mkdocs.yml names c.md, which does not exist",
    ]


def test_documents_beside_the_code_have_a_place():
    listed = subprocess.run(
        ["git", "ls-files", "*/*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    beside = {name for name in listed.stdout.split() if not name.startswith("docs/")}
    assert beside <= set(sources.DOCUMENTS)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a document in each place."""
    monkeypatch.setattr(sources, "flags_page", lambda: "")
    folder = tmp_path / "repository"
    for name in (*sources.DOCUMENTS, "README.md", "docs/a.md", "docs/b.png", "tools/x.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


@pytest.mark.parametrize("link", ["none.md", "none.png", "../none.py", "reference/none.md"])
def test_a_link_to_a_file_that_there_is_not_is_refused(tmp_path, repository, link):
    text = f"[a](b.png) [f](reference/flags.md)\n[dead]({link})\n"
    (repository / "docs/a.md").write_text(text)
    message = f"^docs/a.md has a link to {re.escape(link)}, which does not exist$"
    with pytest.raises(ValueError, match=message):
        sources.write_sources(tmp_path / "out", repository)


def test_links_are_moved_with_their_documents(tmp_path, repository):
    (repository / "benchmarks/README.md").write_text(
        "[a](../docs/a.md#b) ![b](../docs/b.png) [x](../tools/x.py) [d](../tools) [h](https://h)\n"
        "[c](../CONTRIBUTING.md) [home](../README.md)\n"
        "```text\n[a](../docs/a.md)\n```\n"
    )
    sources.write_sources(tmp_path / "out", repository)
    assert (tmp_path / "out/project/benchmarks.md").read_text() == (
        "[a](../a.md#b) ![b](../b.png) [x](../files/tools/x.py) d [h](https://h)\n"
        "[c](contributing.md) [home](../index.md)\n"
        "```text\n[a](../docs/a.md)\n```\n"
    )
    assert (tmp_path / "out/files/tools/x.py").read_text() == "tools/x.py\n"
