"""The rules for docstrings, as functions that find what breaks them; see
`tests/unit/test_docstrings.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron" / "early_exit"
INITIALISERS = ("__init__", "__post_init__")
SHAPE = re.compile(r"\[(?:[\w .*/+()-]+, )*[\w .*/+()-]+\]|any\s+shape|0-dimensional")
TENSOR = re.compile(r"\bTensor\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A class or function of a file.

    Attributes:
        name: the file below the package, and the name in it.
        node: its tree.
        owner: the class that it is defined in.
    """

    name: str
    node: ast.ClassDef | Function
    owner: ast.ClassDef | None

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def said(self) -> str:
        """The docstring, for an initialiser with that of its class."""
        is_initialiser = self.node.name in INITIALISERS and self.owner is not None
        return self.docstring + (ast.get_docstring(self.owner) or "" if is_initialiser else "")


def definitions(tree: ast.Module, path: str) -> Iterator[Definition]:
    yield from _inside(tree.body, None, f"{path} ")


def _inside(body: list[ast.stmt], owner: ast.ClassDef | None, name: str) -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and node.name not in INITIALISERS:
            continue
        yield Definition(name + node.name, node, owner)
        if isinstance(node, ast.ClassDef):
            yield from _inside(node.body, node, f"{name}{node.name}.")


TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
ALL = [one for path, tree in TREES.items() for one in definitions(tree, path)]


def classes(of: list[Definition]) -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    for one in of:
        if isinstance(one.node, ast.ClassDef):
            found.setdefault(one.node.name, []).append(one.node)
    return found


def is_inherited(method: str, owner: ast.ClassDef, known: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a base class of the package documents a method of this name."""
    waiting, seen = [owner], {owner.name}
    while waiting:
        for base in waiting.pop().bases:
            named = base.value if isinstance(base, ast.Subscript) else base
            name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", "")
            for one in known.get(name, []) if name not in seen else []:
                waiting.append(one)
                for node in one.body:
                    if getattr(node, "name", "") == method and ast.get_docstring(node):
                        return True
            seen.add(name)
    return False


def without_docstring(found: list[Definition]) -> list[str]:
    known = classes(found)
    return [
        one.name
        for one in found
        if one.node.name not in INITIALISERS
        and not one.docstring
        and (one.owner is None or not is_inherited(one.node.name, one.owner, known))
    ]


def raised(function: Function) -> Iterator[str]:
    """The exceptions that leave a function by statements of its own."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield re.sub(r"\(.*", "", ast.unparse(node.exc), flags=re.DOTALL)
        if isinstance(node, ast.Try):
            caught = {"" if one.type is None else ast.unparse(one.type) for one in node.handlers}
            if caught & {"", "Exception", "BaseException"}:
                # Only what is raised behind it leaves the function.
                waiting += [*node.handlers, *node.orelse, *node.finalbody]
                continue
        waiting.extend(ast.iter_child_nodes(node))


def silent_about_exceptions(found: list[Definition]) -> list[str]:
    return [
        one.name
        for one in found
        if isinstance(one.node, Function)
        and any(
            not re.search(rf"Raises:|[Rr]aise|[Rr]efuse|{re.escape(name)}", one.said)
            for name in raised(one.node)
            if name != "NotImplementedError"
        )
    ]


def without_shape(found: list[Definition]) -> list[str]:
    known = classes(found)
    names = []
    for one in found:
        if not isinstance(one.node, Function) or (
            one.owner is not None and is_inherited(one.node.name, one.owner, known)
        ):
            continue
        arguments = one.node.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotations = [*(one.annotation for one in given), one.node.returns]
        has_tensor = any(
            TENSOR.search(ast.unparse(annotation)) for annotation in annotations if annotation
        )
        if has_tensor and not SHAPE.search(one.said):
            names.append(one.name)
    return names


def without_meaning(found: list[Definition]) -> list[str]:
    """Fields of classes that nothing is said of."""
    names = []
    for one in found:
        if not isinstance(one.node, ast.ClassDef):
            continue
        for node, following in pairwise([*one.node.body, ast.Pass()]):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            name = node.target.id
            is_described = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            if not (is_described or name.startswith("_") or re.search(rf"\b{name}\b", one.said)):
                names.append(f"{one.name}.{name}")
    return names
