"""Tasks that are made of Python's standard library and its manual, which every machine has."""

import ast
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from megatron.early_exit.data.standard_library import is_prose_or_code, manual, modules

_LEAST_BEFORE = 80
"""Characters that a prompt has at least, so that it says what kind of text this is."""
_LEAST_LINE = 8
"""Characters of a line that is worth guessing."""


@dataclass(frozen=True, slots=True)
class LibraryItem:
    """A prompt, what the library has behind it, and what ends an answer."""

    prompt: str
    reference: str
    stop: tuple[str, ...] = ()


def next_lines(count: int, prompt_characters: int, seed: int) -> list[LibraryItem]:
    """Code, of which the next line is wanted; one of each module.

    Args:
        count: most items.
        prompt_characters: most characters of a prompt, which begins with a line.
        seed: of the choice.
    """

    def of(text: str, draw: random.Random) -> LibraryItem | None:
        lines = text.splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        places = [
            i
            for i, line in enumerate(lines)
            if starts[i] > _LEAST_BEFORE and len(line.strip()) >= _LEAST_LINE
        ]
        if not places:
            return None
        place = draw.choice(places)
        prompt = _whole_lines(text[: starts[place]], prompt_characters)
        return LibraryItem(prompt, lines[place].rstrip("\n"), ("\n",))

    return _choose(modules(), of, count, seed)


def docstrings(count: int, prompt_characters: int, seed: int) -> list[LibraryItem]:
    """The head of a function, of whose docstring the first line is wanted; one of each module."""

    def of(text: str, draw: random.Random) -> LibraryItem | None:
        found = [one for one in _docstrings(text) if len(one[0]) > _LEAST_BEFORE]
        if not found:
            return None
        before, line = draw.choice(found)
        return LibraryItem(_whole_lines(before, prompt_characters), line, ("\n", '"""'))

    return _choose(modules(), of, count, seed)


def manual_texts(count: int, prompt_characters: int, seed: int) -> list[LibraryItem]:
    """The beginning of a topic of the manual, whose continuation is wanted."""

    def of(text: str, _: random.Random) -> LibraryItem | None:
        if len(text) < 2 * prompt_characters:
            return None
        end = 2 * prompt_characters
        return LibraryItem(text[:prompt_characters], text[prompt_characters:end])

    return _choose(manual(), of, count, seed)


MAKERS: Mapping[str, Callable[[int, int, int], list[LibraryItem]]] = {
    "next_line": next_lines,
    "docstring": docstrings,
    "manual": manual_texts,
}
"""The tasks by their names."""


def _choose(
    texts: Iterable[str],
    make: Callable[[str, random.Random], LibraryItem | None],
    count: int,
    seed: int,
) -> list[LibraryItem]:
    """Items of that many texts at most, which are drawn without looking at the others."""
    draw = random.Random(seed)
    shuffled = list(texts)
    draw.shuffle(shuffled)
    items: list[LibraryItem] = []
    for text in shuffled:
        if len(items) == count:
            break
        item = make(text, draw) if is_prose_or_code(text) else None
        if item is not None:
            items.append(item)
    return items


def _whole_lines(text: str, most: int) -> str:
    """The end of a text, from the beginning of a line where that leaves something."""
    if len(text) <= most:
        return text
    end = text[-most:]
    _, _, lines = end.partition("\n")
    return lines if len(lines) > _LEAST_BEFORE else end


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """What stands before the first line of each docstring of a function, and that line."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
            continue
        place = node.body[0].lineno - 1
        before, quotes, rest = lines[place].partition('"""')
        line = rest.partition('"""')[0].rstrip("\n")
        if quotes and not before.strip() and len(line) >= _LEAST_LINE:
            yield "".join(lines[:place]) + before + quotes, line
