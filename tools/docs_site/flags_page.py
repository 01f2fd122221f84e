"""The page of every flag, made from the parsers that read the flags."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.params import RANGES

REPOSITORY = Path(__file__).resolve().parents[2]
_MAKER = "build_parser"
_HEADER = "| flag | allowed | default | meaning |\n|---|---|---|---|"
_KINDS: Mapping[Any, str] = {int: "integer", float: "number", Path: "path"}
_COUNTS = {"+": "one or more", "*": "any number"}
_INTRODUCTION = """\
# Every flag

This page is made from the parsers of the command lines whenever the site is built. Training has
these flags beside Megatron's own, which `pretrain_early_exit_gpt.py --help` lists; each tool also
takes `--help`."""


def flags_page() -> str:
    """The page, in Markdown: training first, then each tool in `tools/`.

    Raises:
        ValueError: a tool makes its parser elsewhere than in its function `build_parser`, where
            this page would not find it.
    """
    parts = [_INTRODUCTION, "## Training {#training}"]
    parts += _tables(training_parser(), "training")
    for path in tool_paths():
        parts += _tool(path)
    return "\n\n".join(parts) + "\n"


def training_parser() -> argparse.ArgumentParser:
    """The flags that training has beside Megatron's own."""
    from megatron.early_exit.training.cli.arguments import add_early_exit_arguments

    return add_early_exit_arguments(argparse.ArgumentParser(add_help=False))


def tool_paths() -> list[Path]:
    """The files of the command lines in `tools/`."""
    return sorted((REPOSITORY / "tools").glob("*.py"))


def tool_parser(path: Path) -> argparse.ArgumentParser | None:
    """The parser of a tool; None if it takes the command line of another program.

    Raises:
        ValueError: it makes a parser elsewhere than in its function `build_parser`.
    """
    text = path.read_text(encoding="utf-8")
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    if _MAKER in defined:
        parser: argparse.ArgumentParser = getattr(import_module(f"tools.{path.stem}"), _MAKER)()
        return parser
    if "ArgumentParser(" in text:
        raise ValueError(f"{path.name} makes a parser, allowed: in its function {_MAKER}()")
    return None


def _tool(path: Path) -> Iterator[str]:
    yield f"## tools/{path.name} {{#{path.stem}}}"
    parser = tool_parser(path)
    if parser is None:
        yield ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    else:
        yield inspect.cleandoc(parser.description or "")
        yield from _tables(parser, path.stem)


def _tables(parser: argparse.ArgumentParser, anchor: str) -> Iterator[str]:
    """The tables of a parser, one for each group of flags, and then those of its verbs."""
    for group in parser._action_groups:
        shown = [one for one in group._group_actions if _is_shown(one)]
        if not shown:
            continue
        if group.title not in ("options", "positional arguments"):
            yield f"### {_titled(group.title)} {{#{anchor}-{_slug(group.title)}}}"
            if group.description:
                yield _titled(group.description)
        yield "\n".join([_HEADER, *(_row(parser, action) for action in shown)])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield f"### {name} {{#{anchor}-{name}}}"
                yield _titled(verb.description) + "."
                yield from _tables(verb, f"{anchor}-{name}")


def _is_shown(action: argparse.Action) -> bool:
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return action.help != argparse.SUPPRESS and not isinstance(action, hidden)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    meaning, default = _help(parser, action), _default(action)
    if action.nargs != 0 and not action.required:
        meaning, default = _without_default(meaning, default)
    allowed = _allowed(action)
    if not meaning and action.dest in _REQUEST_FIELDS:
        # generate.py leaves its fields' descriptions to SamplingParams.
        meaning = _REQUEST_FIELDS[action.dest]
        allowed = allowed if action.choices or action.dest not in RANGES else _range(action)
    cells = (_names(action), allowed, _escaped(default), _escaped(meaning))
    return f"| {' | '.join(cells)} |"


def _names(action: argparse.Action) -> str:
    names = action.option_strings or [_metavar(action)]
    return ", ".join(f"`{name}`" for name in names)


def _metavar(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()


def _allowed(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return _counted(action, ", ".join(f"`{choice}`" for choice in action.choices))
    return _counted(action, _KINDS.get(action.type, "text"))


def _range(action: argparse.Action) -> str:
    return _counted(action, _escaped(str(RANGES[action.dest])))


def _counted(action: argparse.Action, kind: str) -> str:
    if action.nargs is None:
        return kind
    return f"{_COUNTS.get(str(action.nargs), action.nargs)}: {kind}"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    values = {**vars(action), "prog": parser.prog, "default": _default(action)}
    return " ".join(((action.help or "") % values).split())


def _without_default(text: str, default: str) -> tuple[str, str]:
    """A help text without the default that it names, and that default in its words."""
    if text.startswith("default: "):
        return "", text.removeprefix("default: ").replace("None", default)
    named = re.search(r" ?\(default: ((?:[^()]|\([^()]*\))*)\)", text)
    if named is None:
        return text, default
    return text.replace(named[0], ""), named[1]


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    value = action.default
    if value is None or value is False or value in ([], (), argparse.SUPPRESS):
        return "off" if action.nargs == 0 else "none"
    if value is True:
        return "on"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _titled(text: str | None) -> str:
    return text[:1].upper() + text[1:] if text else ""


def _slug(title: str | None) -> str:
    words = "".join(one if one.isalnum() else " " for one in (title or "").lower()).split()
    return "-".join(words)


def _escaped(text: str) -> str:
    """Text as Markdown shows it in a cell of a table."""
    for mark in "\\`*_[]<>|{}":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else f"&#{ord(mark)};")
    return text


def field_texts(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a data class, on one line each."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for one, following in pairwise(tree.body):
        match one, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[name] = " ".join(text.split()).replace("`", "")
    return texts


_REQUEST_FIELDS = field_texts(SamplingParams)
