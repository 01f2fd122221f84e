"""How many texts a promise needs."""

import math
from collections.abc import Mapping, Sequence

from megatron.early_exit.evaluation.choosing.fixed_sequence import level_of_path
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value
from megatron.early_exit.evaluation.choosing.wish import Requirement
from megatron.early_exit.evaluation.items import Item

MOST = 10_000_000
"""Where the search for a number of texts ends."""
_LIMITS = (0.1, 0.05, 0.02, 0.01, 0.005)
_SHARES = (0, 0.25, 0.5, 0.75)


def texts_needed(
    limit: float, level: float, loss: float = 0.0, is_binary: bool = False
) -> int | None:
    """A number of texts that proves a rule, while one less does not.

    Args:
        limit: what a text may be expected to lose, above 0 and below 1.
        level: the largest p-value that proves.
        loss: what a text loses on average, from 0 to 1.
        is_binary: texts lose all or nothing.

    Returns:
        None where that is more than 10 million, or no number is enough.
    """

    def proves(count: int) -> bool:
        total = loss * count
        if is_binary:
            total = float(math.ceil(total))
        return p_value(Losses(total, count, is_binary), limit) <= level

    if loss >= limit:
        return None
    high = 1
    while not proves(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def texts_short(requirements: Sequence[Requirement], level: float) -> dict[str, int | None]:
    """For each task that has too few texts to prove anything, even if none of them lost anything,
    how many it needs; None is more than 10 million.

    Args:
        requirements: what is to be proven.
        level: the largest p-value that proves.
    """
    found: dict[str, int | None] = {}
    for one in requirements:
        needed = texts_needed(one.limit, level, is_binary=one.is_binary)
        if needed is None or found.get(one.task, 0) is None:
            found[one.task] = None
        elif needed > len(one.indices):
            found[one.task] = max(found.get(one.task) or 0, needed)
    return found


def shortage(short: Mapping[str, int | None], items: Sequence[Item]) -> list[str]:
    """What is to be said where tasks have too few texts.

    Args:
        short: see `texts_short`.
        items: all texts.
    """
    lines = []
    for task, needed in short.items():
        count = sum(one.task == task for one in items)
        enough = f"more than {MOST:,}" if needed is None else f"{needed:,} at least"
        lines.append(
            f"task {task} has {count} texts, and needs {enough}, even if none loses anything"
        )
    return [
        *lines,
        "nothing is measured, and no rule is stored; fewer texts are needed for a coarser promise, "
        "and for fewer measures, policies and sets of exits",
    ]


def table(confidence: float = 0.95, num_paths: Sequence[int] = (1, 8)) -> str:
    """The numbers of texts for several promises, as a table in Markdown.

    Args:
        confidence: of the promise.
        num_paths: for how many paths of rules.
    """
    head = ["may be lost", "paths", *(f"{share:.0%} of that is lost" for share in _SHARES)]
    rows = [head, ["---:"] * len(head)]
    for limit in _LIMITS:
        for paths in num_paths:
            level = level_of_path(confidence, paths)
            counts = [texts_needed(limit, level, share * limit) for share in _SHARES]
            rows.append([f"{limit:.1%}", str(paths), *(f"{count:,}" for count in counts)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
