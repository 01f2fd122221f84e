"""Confidence meets a threshold in one file: found by reading the syntax trees of all others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[4] / "megatron" / "early_exit"
RULE = PACKAGE / "inference" / "modes" / "rule.py"
# Copied into users' folders, where it has to be alone.
EXPORTED = PACKAGE / "checkpoint" / "huggingface" / "exported" / "modeling_early_exit.py"
JUDGED = ("confidence", "likelihood")


def comparisons(source: str) -> list[str]:
    """The comparisons of size in which a confidence, or a likelihood made of some, takes part."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops
        ):
            names = {
                inner.attr if isinstance(inner, ast.Attribute) else inner.id
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute | ast.Name)
            }
            if any(judged in name for judged in JUDGED for name in names):
                found.append(ast.unparse(node))
    return found


def test_only_the_rule_compares():
    found = {
        str(path.relative_to(PACKAGE)): found
        for path in PACKAGE.rglob("*.py")
        if path not in (RULE, EXPORTED) and (found := comparisons(path.read_text()))
    }
    assert found == {}
    assert comparisons(RULE.read_text()) != []


@pytest.mark.parametrize(
    "source",
    [
        "if output.confidence >= rule.threshold: pass",
        "taken = threshold < head_confidence",
        "[x for x in found if not 0.2 > x.confidence]",
        "rows = (confidences >= self.threshold).nonzero()",
    ],
)
def test_a_comparison_elsewhere_would_be_found(source):
    assert comparisons(source)


def test_what_is_no_decision_is_not_found():
    assert comparisons("x = output.confidence\nif confidence is None or threshold > 3: pass") == []
