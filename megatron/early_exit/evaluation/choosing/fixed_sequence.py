"""Tests rules one after another, from the safest to the most aggressive.

Each path of rules is tested at the same level: the whole error that is allowed, divided by the
number of paths (Bonferroni). On a path the first rule that is not proven ends it (fixed-sequence
testing, arXiv 2110.01052, section 4). So with the wished confidence all rules that are proven, on
whatever path, lose no more than they may, and any of them can be chosen, by whatever is found out
about their speed, and on whatever texts.
"""

from collections.abc import Iterable
from itertools import takewhile


def level_of_path(confidence: float, num_paths: int) -> float:
    """The largest p-value that proves a rule.

    Args:
        confidence: that no rule is proven that loses more than it may, above 0 and below 1.
        num_paths: how many paths are tested.
    """
    return (1 - confidence) / num_paths


def num_proven(p_values: Iterable[float], level: float) -> int:
    """How many rules of a path are proven, from its beginning.

    Args:
        p_values: of the rules, in an order that was decided without the texts that they come of;
            no more of them are asked for than are needed.
        level: see `level_of_path`.
    """
    return sum(1 for _ in takewhile(lambda p: p <= level, p_values))
