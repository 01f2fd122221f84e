"""Docstrings say what a stranger needs: shapes, units, what is raised, and where ideas come from.

The rule, for every module, class, function and method of the package whose name has no underscore
in front:

1. It has a docstring. A method may leave that to a method of the same name in a base class.
2. What raises an exception by a statement of its own says so: by `Raises:`, or in a sentence with
   "raise", "refuse" or the name of the exception. Exceptions that are caught where they are raised
   do not count. For `__init__` and `__post_init__` the docstring of their class counts, too.
3. What takes or returns a tensor gives a shape in square brackets, or says "any shape" or
   "0-dimensional".
4. A parameter, field or result that is a `float`, or an `int` named like an amount of time, memory
   or text, has its unit in its name (`step_s`, `peak_bytes`, `least_agreement`), or in what is said
   of it ("seconds", "bytes", "share", "from 0 to 1"). Names and words that count are in
   `tests/helpers/docstring_units.py`.
5. A docstring that names a published work gives its source, or its module's docstring does. The
   works and their sources are in `tests/helpers/docstring_sources.py`.

Fields of the public interface, of which the reference has pages, have docstrings below them, or are
named in that of their class.
"""

from __future__ import annotations

import ast

import pytest

from tests.helpers.docstring_rules import (
    ALL,
    TREES,
    definitions,
    silent_about_exceptions,
    without_docstring,
    without_meaning,
    without_shape,
)
from tests.helpers.docstring_sources import without_source
from tests.helpers.docstring_units import without_unit
from tools.docs_site.public_names import PUBLIC


def is_public(name: str) -> bool:
    """Whether a definition is in a page of the reference, or in a class that is."""
    path, _, inside = name.partition(" ")
    module = "megatron.early_exit." + path.removesuffix(".py").replace("/", ".")
    return inside.split(".")[0] in PUBLIC_NAMES.get(module, ())


def public_names() -> dict[str, set[str]]:
    """Public names by the modules that define them."""
    from importlib import import_module

    found: dict[str, set[str]] = {}
    for page in PUBLIC.values():
        for module, names in page.names.items():
            for name in names:
                defined = getattr(import_module(module), name).__module__
                found.setdefault(defined, set()).add(name)
    return found


PUBLIC_NAMES = public_names()


def test_every_name_has_a_docstring():
    assert [path for path, tree in TREES.items() if not ast.get_docstring(tree)] == []
    assert len(ALL) > 1500
    assert without_docstring(ALL) == []


def test_docstrings_say_what_is_raised():
    assert silent_about_exceptions(ALL) == []


def test_docstrings_of_what_has_tensors_give_shapes():
    assert without_shape(ALL) == [], "give a shape such as [s, b, h]"


def test_docstrings_give_the_units_of_numbers():
    assert without_unit(ALL) == [], "say the unit, such as seconds, bytes, or from 0 to 1"


def test_docstrings_give_the_sources_of_published_works():
    assert without_source(TREES) == [], "give the source, see SOURCES"


def test_fields_of_the_public_interface_have_a_meaning():
    public = [one for one in ALL if is_public(one.name)]
    assert {"SamplingParams", "import_hf", "find_plans"} <= {one.node.name for one in public}
    assert without_meaning(public) == []


SOURCE = '''
class Base:
    """A base."""

    def documented(self): """It."""


class Public(Base):
    """Raises:
        ValueError: always.

    Attributes:
        named: here.
    """

    unnamed: int
    named: int
    below: int
    """Here."""
    _own: int

    def __init__(self): raise ValueError("always")

    def documented(self): ...

    def bare(self): ...

    def quiet(self):
        """Says nothing."""
        raise KeyError(3)

    def says(self):
        """KeyError for all."""
        raise KeyError(3)

    def caught(self):
        """Nothing leaves it."""
        try:
            raise KeyError(3)
        except Exception:
            pass

    def _private(self): raise KeyError(3)

    def flat(self, x: Tensor) -> int:
        """A sum."""

    def shaped(self, x: Tensor | None) -> int:
        """A sum of [s, b, h / 2], see `x[0]`."""

    def any(self, x: "Tensor") -> list[Tensor]:
        """Copies, of any shape."""


class Costs:
    """What it takes, in weights."""

    step: float


class Settings:
    """Settings.

    Attributes:
        grace: until it is stopped.
        patience: seconds without data.
        most_s: of an answer.
        quorum: see `Costs.step`.
        credit: see `Costs.missing`.
        capacity: of the cache.
        step: see `Costs`.
    """

    grace: float
    patience: float | None
    most_s: float
    quorum: float
    credit: float
    capacity: int
    size: int
    step: float
    below: float = 1.0
    """A share."""

    def wait(self, delay: int, limit: float, room: float):
        """Wait for `delay`. Its `limit` is in seconds, and its `room` is large.

        Args:
            room: in bytes.
        """

    def slow(self) -> float:
        """How slow it is.

        Args:
            steps: so many.
        """

    def fast(self) -> tuple[float, ...]:
        """Steps a second."""
'''
UNCLEAR = (
    "Settings.grace",
    "Settings.credit",
    "Settings.capacity",
    "Settings.wait.delay",
    "Settings.slow.slow",
)


@pytest.mark.parametrize(
    ("check", "found"),
    [
        (without_docstring, ["bare"]),
        (silent_about_exceptions, ["quiet"]),
        (without_shape, ["flat"]),
        (without_meaning, ["unnamed"]),
    ],
)
def test_what_the_rule_asks_for_would_be_missed(check, found):
    names = check(list(definitions(ast.parse(SOURCE), "file.py")))
    assert [name for name in names if "Public" in name] == [
        f"file.py Public.{name}" for name in found
    ]


def test_a_missing_unit_would_be_found():
    names = without_unit(list(definitions(ast.parse(SOURCE), "file.py")))
    assert sorted(names) == sorted(f"file.py {name}" for name in UNCLEAR)


@pytest.mark.parametrize(
    ("text", "module", "found"),
    [
        ("Thresholds decay as in CALM.", "", ["CALM"]),
        ("Thresholds decay as in CALM (arXiv\n2207.07061).", "", []),
        ("Thresholds decay as in CALM.", "After CALM (arXiv 2207.07061).", []),
        ("As in CALM (arXiv 2404.16710).", "", ["CALM"]),
        ("The LayerSkip of EE-Tuning.", "", ["EE-Tuning", "LayerSkip"]),
        ("FlashAttention-2 (arXiv 2307.08691).", "", []),
        ("Zero-bubble schedules.", "", ["zero-bubble"]),
        ("A MODEL of a calm Younger one.", "", []),
    ],
)
def test_a_missing_source_would_be_found(text, module, found):
    tree = ast.parse(f'"""{module}"""\ndef function():\n    """{text}"""\n')
    assert without_source({"file.py": tree}) == [f"file.py:3 {work}" for work in found]
