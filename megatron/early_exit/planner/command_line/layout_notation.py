"""Megatron's notation of the layers of stages, the value of --pipeline-model-parallel-layout."""

import re
from itertools import groupby

from megatron.early_exit.errors import FieldError, out_of_range

LAYOUT_FLAG = "--pipeline-model-parallel-layout"
"""The flag whose value has this notation."""

# Innermost brackets, then single letters, that are repeated.
_REPEATED_GROUP = re.compile(r"\(([^()]*)\)\*(\d+)")
_REPEATED_LETTER = re.compile(r"([EtL|])\*(\d+)")
_ALLOWED = (
    "stages of t (a layer) that end with |, E (the embedding) in front of the first and L (the "
    "final head) behind the last, repeated by *, for example 'Et*3|(t*4|)*6t*3L'"
)
# No model has as many layers.
_MOST_LETTERS = 10_000


def parse_layout(text: str) -> tuple[int, ...]:
    """The layers of each stage that Megatron's notation of a layout says.

    Raises:
        ValueError: it is not such a layout, or a stage has no layer, which is not modelled.
    """
    expanded = re.sub(r"[\s,]", "", text)
    for pattern in (_REPEATED_GROUP, _REPEATED_LETTER):
        while match := pattern.search(expanded):
            repeated = match[1] * min(int(match[2]), _MOST_LETTERS)
            expanded = expanded[: match.start()] + repeated + expanded[match.end() :]
            if len(expanded) > _MOST_LETTERS:
                raise out_of_range(LAYOUT_FLAG, text, f"up to {_MOST_LETTERS} letters")
    if not re.fullmatch(r"E[t|]*L", expanded):
        raise out_of_range(LAYOUT_FLAG, text, _ALLOWED)
    layers = tuple(map(len, expanded[1:-1].split("|")))
    if not all(layers):
        problem = "has a stage without a layer, which is not modelled"
        raise FieldError(LAYOUT_FLAG, problem, value=text)
    return layers


def layout_text(layers_per_stage: tuple[int, ...]) -> str:
    """The value of Megatron's --pipeline-model-parallel-layout: E is the embedding, t a layer, L
    the final head with its loss; stages end with |."""

    def layers(number: int) -> str:
        return f"t*{number}" if number > 1 else "t"

    text = f"E{layers(layers_per_stage[0])}|"
    for number, equal in groupby(layers_per_stage[1:-1]):
        times = len(list(equal))
        text += f"({layers(number)}|)*{times}" if times > 1 else f"{layers(number)}|"
    return f"{text}{layers(layers_per_stage[-1])}L"
