"""How much a text is like its reference: 0 to 1."""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text in lower case, and each of its other characters but spaces."""
    return _WORD.findall(text.lower())


def exact_match(text: str, reference: str) -> float:
    """The score from 0 to 1: 1 where the texts are equal but for spaces around them, else 0."""
    return float(text.strip() == reference.strip())


def f1(text: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the words, from 0 to 1, in any order, as SQuAD
    has it (arXiv 1606.05250); here with case alone removed, since articles and signs matter in
    code."""
    found, wanted = words(text), words(reference)
    return _harmonic(sum((Counter(found) & Counter(wanted)).values()), found, wanted)


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L's F-measure with equal weights, from 0 to 1: of the longest common subsequence of
    words (Lin, 2004, section 3)."""
    found, wanted = words(text), words(reference)
    return _harmonic(_common_subsequence(found, wanted), found, wanted)


def _harmonic(common: int, found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * common / (len(found) + len(wanted))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, row by row of the table of all beginnings."""
    before = [0] * (len(second) + 1)
    for one in first:
        row = [0]
        for place, other in enumerate(second):
            longer = before[place] + 1 if one == other else max(row[-1], before[place + 1])
            row.append(longer)
        before = row
    return before[-1]


SCORES = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}
"""All of them by their names."""
CHOICE_SCORES = ("accuracy", "accuracy_norm")
"""Scores of prompts with choices: of the choice that is most probable, as a whole or by length."""
