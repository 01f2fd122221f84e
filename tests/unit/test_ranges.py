"""A range refuses all that is not in it, says its ends, and is the one that says so."""

import ast
import math
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import RANGES
from megatron.early_exit.ranges import ABOVE_ZERO, INDEX, ONE_OR_MORE, ZERO_TO_ONE, Range

ROOT = Path(__file__).resolve().parents[2]
# Copied into users' folders, where it has to be alone.
EXPORTED = ROOT / "megatron/early_exit/checkpoint/huggingface/exported"
LESS_THAN_ONE = Range(least=0, most=1, excludes_most=True)
INSIDE = Range(least=0, most=1, excludes_least=True, excludes_most=True)
SHARE = Range(least=0, most=1, excludes_least=True, most_means="off")


@pytest.mark.parametrize(
    ("allowed", "text", "inside", "outside"),
    [
        (ONE_OR_MORE, "1 or more", [1, 10**400], [0, -1, 1.0, True, "1", None]),
        (INDEX, "0 or more", [0, 7], [-1, 0.5, False]),
        (ABOVE_ZERO, "above 0", [1e-300, 3], [0, 0.0, -1, math.inf, math.nan]),
        (ZERO_TO_ONE, "0 to 1", [0, 0.5, 1.0], [-0.1, 1.1, math.nan, math.inf, "0"]),
        (LESS_THAN_ONE, "0 to less than 1", [0, 0.99], [1, 1.0, -1]),
        (SHARE, "above 0, up to 1 (off)", [0.1, 1], [0, 0.0, 2]),
        (INSIDE, "above 0, less than 1", [0.1, 0.99], [0, 0.0, 1, 1.0, 2]),
        (RANGES["seed"], "0 to 2**63 - 1", [0, 2**63 - 1], [2**63, -1]),
        (RANGES["top_k"], "0 (no limit) or more", [0, 5], [-1]),
    ],
)
def test_a_range_knows_its_numbers_and_says_its_ends(allowed, text, inside, outside):
    assert str(allowed) == text
    assert all(number in allowed for number in inside)
    assert not any(value in allowed for value in outside)


@pytest.mark.parametrize(
    ("allowed", "value", "message"),
    [
        (ONE_OR_MORE, 0, "size 0 is out of range, allowed: 1 or more"),
        (ONE_OR_MORE, 1.5, "size 1.5 is not an integer, allowed: 1 or more"),
        (ZERO_TO_ONE, "1", "size '1' is not a number, allowed: 0 to 1"),
        (ZERO_TO_ONE, math.nan, "size nan is out of range, allowed: 0 to 1"),
    ],
)
def test_a_refusal_names_the_field_the_value_and_the_range(allowed, value, message):
    allowed.check(size=1, other=None)
    with pytest.raises(FieldError) as raised:
        allowed.check(other=1, size=value)
    assert str(raised.value) == message
    with pytest.raises(FieldError, match=r"^--max-size "):
        allowed.check_flags(Namespace(max_size=value), "max_size")


def test_no_other_file_says_that_a_number_is_out_of_range():
    files = [*(ROOT / "megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    found = {
        str(path.relative_to(ROOT)) for path in files if "is out of range" in said(path.read_text())
    }
    exported = (EXPORTED / "modeling_early_exit.py").relative_to(ROOT)
    assert found == {"megatron/early_exit/errors.py", str(exported)}


def said(source: str) -> str:
    """The strings of a file but for its docstrings, as one text."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose]
    return " ".join(one.value for one in strings if isinstance(one.value, str))
