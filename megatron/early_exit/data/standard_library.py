"""Texts that every machine has: the sources of Python's standard library and its manual."""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Not the library itself, not written by hand, or (encodings, pydoc_data) mostly tables and quotes.
EXCLUDED_DIRECTORIES = frozenset(
    {"__phello__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
    | {"site-packages", "test", "tests"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
# Above this share of digits a file is a table of numbers, too.
MAX_DIGIT_SHARE = 0.1
# SentencePiece writes a space as this character, so a text that holds it would come back changed.
SPACE_MARK = "\u2581"


def modules() -> Iterator[str]:
    """The source of each module of the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if EXCLUDED_DIRECTORIES.isdisjoint(parts) and not parts[0].startswith(EXCLUDED_PREFIXES):
            yield path.read_text(encoding="utf-8")


def manual() -> Iterator[str]:
    """Each topic of the language's reference manual, in a fixed order."""
    yield from (text for _, text in sorted(topics.items()))


def standard_library_texts() -> Iterator[str]:
    """Each module and each topic of the manual, in a fixed order."""
    yield from modules()
    yield from manual()


def is_prose_or_code(text: str) -> bool:
    """Whether a text is worth learning from, and survives a SentencePiece tokenizer unchanged."""
    digits = sum(text.count(digit) for digit in string.digits)
    return bool(text.strip()) and digits <= MAX_DIGIT_SHARE * len(text) and SPACE_MARK not in text
