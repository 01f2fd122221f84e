"""The contexts that say in which format modules compute, and in which their weights are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformer_engine.common.recipe import Recipe


class FP8GlobalStateManager:
    """The formats in force: for computing and for building; None is that of the parameters."""

    recipe: Recipe | None = None
    init_recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: object = None,
) -> Iterator[None]:
    """Compute in FP8 inside, or with `enabled` false not."""
    outer = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = outer


@contextmanager
def fp8_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Build weights in FP8 inside; here they only say that they are."""
    outer = FP8GlobalStateManager.init_recipe
    FP8GlobalStateManager.init_recipe = recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.init_recipe = outer
