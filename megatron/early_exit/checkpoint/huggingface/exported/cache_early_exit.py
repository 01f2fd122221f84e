"""The cache of a sequence that is generated with early exits."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# What the installed transformers calls keys and values where it gives and takes them: `cache` since
# 5.24, `past_key_values` before.
CACHE_NAME = (
    "cache"
    if "cache" in {field.name for field in fields(CausalLMOutputWithPast)}
    else "past_key_values"
)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The keys and values that were given by either of their two names.

    Raises:
        ValueError: both are given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one thing: give one of them")
    return past_key_values if cache is None else cache


class EarlyExitCache(DynamicCache):
    """Keys and values of one sequence, and the hidden states that its deeper layers have not
    processed yet.

    Args:
        threshold: least confidence to leave at an exit.
        enabled: the exits that may be left at, by their layers; None is all.

    Attributes:
        exit_layers: for each token, how many layers were run to choose it.
        confidences: of these choices.
    """

    def __init__(self, threshold: float, enabled: Iterable[int] | None = None) -> None:
        super().__init__()
        self.threshold = threshold
        self.enabled = None if enabled is None else frozenset(enabled)
        self.exit_layers: list[int] = []
        self.confidences: list[float] = []
        self._waiting: dict[int, Tensor] = {}

    def put(self, segment: int, hidden: Tensor) -> None:
        """Append positions [1, s, h] to those that wait in front of a segment."""
        self._waiting[segment] = self.take(segment, hidden)

    def take(self, segment: int, hidden: Tensor) -> Tensor:
        """All positions that wait in front of a segment, followed by these, [b, s, h]."""
        earlier = self._waiting.pop(segment, None)
        return hidden if earlier is None else torch.cat((earlier, hidden), dim=1)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: some layers do not have the positions yet.

        Raises:
            ValueError: always.
        """
        raise ValueError("early exit cannot remove tokens, which assisted generation requires")
