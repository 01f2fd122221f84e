"""The recipes of FP8 and FP4 by name; the stand-in rounds alike in all of them."""

from __future__ import annotations

import enum


class Format(enum.Enum):
    """Number formats of the forward and of the backward pass."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """How tensors are scaled before they are rounded."""

    def __init__(self, **_: object) -> None: ...


class DelayedScaling(Recipe):
    """By the largest values of earlier passes."""


class Float8CurrentScaling(Recipe):
    """By the tensor's own largest value."""


class Float8BlockScaling(Recipe):
    """By the largest value of each block."""


class MXFP8BlockScaling(Recipe):
    """By powers of two for each 32 values."""


class NVFP4BlockScaling(Recipe):
    """FP4, by the largest value of each 16 values."""
