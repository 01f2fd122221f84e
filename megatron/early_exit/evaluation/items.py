"""What a model is asked to do: prompts with references or choices, from files or made here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.early_exit.evaluation.library_items import MAKERS

ALL = "all"
"""The name of all tasks together."""
FORMS = (
    '{"prompt": "...", "reference": "..."}, {"prompt": "...", "choices": ["...", "..."], '
    '"gold": 0}, {"prompt": "..."} or {"text": "..."}'
)


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a task.

    Attributes:
        task: name of the task.
        prompt: what the model continues.
        reference: how the text goes on; None where that is unknown.
        choices: texts of which the model is to find one most probable behind the prompt. Such a
            prompt is not continued.
        gold: index of the right one.
        stop: texts that end an answer before it is compared with the reference.
    """

    task: str
    prompt: str
    reference: str | None = None
    choices: tuple[str, ...] = ()
    gold: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Item":
        """The inverse of `as_dict`, of values as JSON has them."""
        texts = {name: tuple(values[name]) for name in ("choices", "stop")}
        return cls(**{**values, **texts})

    def cut(self, text: str) -> str:
        """An answer up to the first stop text in it."""
        return text[: min((at for at in map(text.find, self.stop) if at >= 0), default=len(text))]

    def length(self, token_texts: Sequence[str]) -> int:
        """How many tokens of an answer there are up to the one that completes a stop text; all,
        where none does."""
        text = ""
        for place, one in enumerate(token_texts, start=1):
            text += one
            if any(stop in text for stop in self.stop):
                return place
        return len(token_texts)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**asdict(self), "choices": list(self.choices), "stop": list(self.stop)}


def read_tasks(
    names: Sequence[str], count: int, prompt_characters: int, seed: int
) -> tuple[Item, ...]:
    """The prompts of some tasks, the same on every run.

    Args:
        names: of tasks that are made of Python's standard library (`MAKERS`), or paths of files
            with JSON lines.
        count: most prompts of each task.
        prompt_characters: most characters of a prompt that is made, or cut from a whole text.
        seed: of the choice among what the standard library has.

    Raises:
        ValueError: a task is unknown, given twice or has no prompts, or a file cannot be read.
    """
    items: list[Item] = []
    for name in names:
        if name in MAKERS:
            made = MAKERS[name](count, prompt_characters, seed)
            if not made:
                raise ValueError(
                    f"--tasks {name} has no prompts with --prompt-characters {prompt_characters}, "
                    "allowed: fewer characters, or another task"
                )
            items += [Item(name, one.prompt, one.reference, stop=one.stop) for one in made]
            continue
        path = Path(name)
        if path.suffix != ".jsonl":
            raise ValueError(
                f"--tasks {name}: is no task, allowed: {', '.join(MAKERS)}, or a .jsonl file"
            )
        if path.stem == ALL:
            raise ValueError(
                f"--tasks {name}: {ALL} is what all tasks together are called, allowed: a file of "
                "another name"
            )
        items += _spread(_read_file(path, prompt_characters), count)
    tasks = list(map(_task_name, names))
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(
                f"--tasks {' '.join(names)}: several tasks are called {task}, allowed: each task "
                "once, and files whose names differ without their folders"
            )
    return tuple(items)


def _task_name(name: str) -> str:
    return name if name in MAKERS else Path(name).stem


def _spread(items: Sequence[Item], count: int) -> Sequence[Item]:
    """That many of them at most, from the whole list."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _read_file(path: Path, prompt_characters: int) -> list[Item]:
    try:
        # Strings of JSON may have further signs that `splitlines` takes for a line's end.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tasks {path} cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _of_json(_parse(line), path.stem, prompt_characters)
        except (ValueError, RecursionError) as error:
            problem = f"--tasks {path}, line {number}: {error}"
            raise ValueError(f"{problem}, allowed: {FORMS}") from error
        items += [] if item is None else [item]
    if not items:
        raise ValueError(
            f"--tasks {path} has no prompts, allowed: 1 or more; a text needs more than "
            f"--prompt-characters {prompt_characters}"
        )
    return items


def _parse(line: str) -> object:
    found = json.loads(line)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair, which is no character") from error
    return found


def _of_json(line: object, task: str, prompt_characters: int) -> Item | None:
    """The item of a line; None for a whole text that is too short to be cut in two."""
    if not isinstance(line, Mapping):
        raise ValueError("is no object")
    unknown = set(line) - {"prompt", "reference", "choices", "gold", "stop", "text"}
    if "text" in line:
        if len(line) > 1 or not isinstance(line["text"], str):
            raise ValueError("has more than a text, or one that is no string")
        text = line["text"]
        if len(text) <= prompt_characters:
            return None
        # As much again is a reference that is worth comparing with.
        end = 2 * prompt_characters
        return Item(task, text[:prompt_characters], text[prompt_characters:end])
    if unknown:
        raise ValueError(f"has the unknown field {min(unknown)!r}")
    prompt, reference = line.get("prompt"), line.get("reference")
    choices, gold, stop = line.get("choices", []), line.get("gold"), line.get("stop", [])
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("has no prompt of 1 character or more")
    if not isinstance(reference, str | None):
        raise ValueError("has a reference that is no string")
    for name, texts in (("choices", choices), ("stop", stop)):
        is_list = isinstance(texts, list) and all(isinstance(one, str) and one for one in texts)
        if not is_list:
            raise ValueError(f"has {name} that are no list of strings of 1 character or more")
    if choices:
        is_index = isinstance(gold, int) and not isinstance(gold, bool)
        if len(choices) < 2 or not is_index or gold not in range(len(choices)):
            raise ValueError("has fewer than 2 choices, or a gold that is not the index of one")
        if reference is not None or stop:
            raise ValueError("has choices beside a reference or stop, which would have no effect")
    elif gold is not None:
        raise ValueError("has a gold without choices")
    return Item(task, prompt, reference, tuple(choices), gold, tuple(stop))
