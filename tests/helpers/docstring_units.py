"""What public names say of the units of their numbers; see `tests/unit/test_docstrings.py`.

A number is a parameter, a field, a property or what a function returns, if its annotation has
`float`, or has `int` where the name is that of an amount of time, memory or text. Its unit is in
its name, or in what is said of it:

- in its own entry below `Args:` or `Attributes:`, in the text below a field, or its description;
- of a parameter without an entry, in the sentences that name it, or where there are none in all
  that its function says outside of entries;
- of a field, by a phrase like "in weights" in what its class says of all fields;
- where such a text refers to another place ("see `message_weights`"), there, for the same name.

What is a plain factor or a probability says that: it has no other unit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from tests.helpers.docstring_rules import (
    INITIALISERS,
    Definition,
    classes,
    is_inherited,
)

_IN_NAME = re.compile(
    r"(?:^|_)(?:"
    r"s|ms|us|ns|seconds|milliseconds|minutes|hours|days|bytes|kb|mb|gb|gib|tokens|flops|inches|"
    r"share|shares|part|ratio|ratios|fraction|percent|probability|probabilities|prob|chance|p|likelihood|"
    r"confidence|confidences|threshold|thresholds|dropout|agreement|speedup|factor|scale|base|"
    r"temperature|temperatures|weight|weights|penalty|epsilon|eps|std|logprob|logprobs|logit|"
    r"logits|perplexity|lr"
    r")(?:_|$)|^num_|learning_rate"
)
_UNIT = (
    r"(?:"
    r"(?:milli|micro|nano)?seconds|a second|minutes|hours|days|bytes|[KMGT]i?B|inches|"
    r"tokens|positions|rows|columns|entries|samples|sequences|prompts|microbatches|iterations|"
    r"layers|steps|operations|weights|accelerators|ranks|cores|units?|"
    r"shares?|parts?|fractions?|ratio|factor|percent|chances?|probability|probabilities|likely|"
    r"likelihood|logarithms?|log-likelihoods?|logits?|nats|p-values?|perplexity|perplexities|"
    r"speed-ups?|learning rates?|how often|how many|times the|times as|"
    r"number of|(?:from )?0 to 1|above 0 and below 1|points of 100"
    r")"
)
_SAID = re.compile(rf"\b{_UNIT}\b", re.IGNORECASE)
_SAID_OF_ALL = re.compile(rf"\b(?:in|as) (?:[\w-]+ )?{_UNIT}\b", re.IGNORECASE)
_AMOUNT = re.compile(
    r"(?:^|_)(?:time|timeout|delay|duration|interval|latency|age|grace|patience|period|memory|"
    r"budget|capacity|length)(?:_|$)"
)
"""In names of whole numbers that have a unit; others count what they are named after."""
_REFERENCE = re.compile(r"\b[Ss]ee\s+(?:`(?P<name>[\w.]+)`|the class)")


@dataclass(frozen=True)
class Number:
    """A number that a definition takes, has or gives.

    Attributes:
        place: name of the definition.
        own: its own name.
        owner: class of the field, or name of the function; for an initialiser that of its class.
        said: all that may say its unit.
    """

    place: str
    own: str
    owner: str
    said: str

    @property
    def has_unit(self) -> bool:
        return bool(_IN_NAME.search(self.own) or _SAID.search(self.said))

    def refers_to(self, known: set[tuple[str, str]]) -> bool:
        """Whether it is left to one of these numbers, by owner and name, to say the unit."""
        of_class = self.place.split(" ")[1].split(".")[0]
        for found in _REFERENCE.finditer(self.said):
            *before, last = (found["name"] or of_class).split(".")
            owner = before[-1] if before else last
            if {(last, self.own), (last, last), (owner, last)} & known:
                return True
        return False


def without_unit(found: list[Definition]) -> list[str]:
    bases = classes(found)
    unclear = [number for one in found for number in _numbers(one, bases)]
    known: set[tuple[str, str]] = set()
    is_new = True
    while is_new:
        clear = [number for number in unclear if number.has_unit or number.refers_to(known)]
        unclear = [number for number in unclear if number not in clear]
        known |= {(number.owner, number.own) for number in clear}
        is_new = bool(clear)
    return [f"{number.place}.{number.own}" for number in unclear]


def _numbers(one: Definition, bases: Mapping[str, list[ast.ClassDef]]) -> Iterator[Number]:
    if isinstance(one.node, ast.ClassDef):
        yield from _fields(one, one.node)
        return
    if one.owner is not None and is_inherited(one.node.name, one.owner, bases):
        return
    name = one.node.name
    prose, entries = _parts(one.docstring)
    if name in INITIALISERS and one.owner is not None:
        name = one.owner.name
        prose, entries = _parts(ast.get_docstring(one.owner) or "")
    arguments = one.node.args
    for given in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        if _has_unit_to_say(given.arg, given.annotation):
            said = entries.get(given.arg) or _about(given.arg, prose)
            yield Number(one.name, given.arg, name, said)
    if _has_unit_to_say(name, one.node.returns):
        yield Number(one.name, name, name, prose)


def _about(name: str, prose: str) -> str:
    """The sentences that name a parameter; all of them where none does."""
    sentences = re.split(r"(?<=[.:;])\s", prose)
    return "\n".join(one for one in sentences if f"`{name}`" in one) or prose


def _fields(one: Definition, node: ast.ClassDef) -> Iterator[Number]:
    prose, entries = _parts(one.docstring)
    said_of_all = " ".join(_SAID_OF_ALL.findall(prose))
    for field, following in pairwise([*node.body, ast.Pass()]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        name = field.target.id
        if name.startswith("_") or not _has_unit_to_say(name, field.annotation):
            continue
        below = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            below = str(following.value.value)
        said = [entries.get(name, ""), below, _description(field.value), said_of_all]
        yield Number(one.name, name, node.name, "\n".join(said))


def _has_unit_to_say(name: str, annotation: ast.expr | None) -> bool:
    kind = "" if annotation is None else ast.unparse(annotation)
    is_whole = re.search(r"\bint\b", kind) and _AMOUNT.search(name)
    return bool(re.search(r"\bfloat\b", kind) or is_whole)


def _description(value: ast.expr | None) -> str:
    """What `Field(description=...)` says."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return " ".join(ast.unparse(one.value) for one in given if one.arg == "description")


def _parts(docstring: str) -> tuple[str, dict[str, str]]:
    """What a docstring says outside of entries, and what its entries say by their names."""
    prose: list[str] = []
    entries: dict[str, str] = {}
    names: list[str] = []
    is_inside = False
    for line in docstring.splitlines():
        if re.fullmatch(r"(?:Args|Attributes|Raises):", line):
            is_inside, names = True, []
        elif is_inside and line.startswith("    "):
            if entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
                names = entry[1].split(", ")
                entries |= dict.fromkeys(names, entry[2])
            else:
                entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        elif line:
            is_inside = False
            prose.append(line)
    return "\n".join(prose), entries
