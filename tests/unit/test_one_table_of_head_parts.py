"""The parts of a head are listed in one file: found by reading the syntax trees of all others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint.huggingface.exported import configuration_early_exit
from megatron.early_exit.config import HEAD_PARTS

PACKAGE = Path(__file__).resolve().parents[2] / "megatron" / "early_exit"
TABLE = PACKAGE / "config.py"
# Copied into users' folders, where they have to be alone.
EXPORTED = PACKAGE / "checkpoint" / "huggingface" / "exported"
FIELDS = {part.field for part in HEAD_PARTS}


def named_parts(source: str) -> set[str]:
    """The parts of heads that a file names, by their fields."""
    return FIELDS & set(_names(ast.parse(source)))


def _names(tree: ast.AST) -> Iterator[str]:
    """Names in code, and words of its strings, but for docstrings: their examples have flags."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield from re.findall(r"[a-z]\w+", text.replace("-", "_"))


def test_no_other_file_lists_them():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parents[1] / "tools").glob("*.py")]
    listed = {
        str(path.relative_to(PACKAGE.parents[1])): sorted(found)
        for path in files
        if path != TABLE
        and not path.is_relative_to(EXPORTED)
        and len(found := named_parts(path.read_text())) > 1
    }
    assert listed == {}
    assert named_parts(TABLE.read_text()) == FIELDS


def test_exported_folders_know_every_part():
    source = Path(configuration_early_exit.__file__).read_text()
    # What exits predict does not depend on a part beside their branch, so it is left out.
    assert named_parts(source) == {part.field for part in HEAD_PARTS if not part.is_beside}


@pytest.mark.parametrize(
    "source",
    [
        "if exits.use_exit_norm or exits.use_exit_mlp: pass",
        "heads = ('use_exit_norm', 'use_exit_block')",
        "flags = {'--use-exit-norm': 1, '--untie-exit-output-weights': 2}",
        "Config(use_exit_norm=True, use_exit_block=False)",
        "raise ValueError(f'{why}: give --use-exit-norm or --use-exit-mlp')",
    ],
)
def test_a_list_elsewhere_would_be_found(source):
    assert len(named_parts(source)) == 2
