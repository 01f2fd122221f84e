"""Repairs of Megatron's distributed optimizer that need no optimizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.patches import distributed_optimizer  # noqa: E402
from megatron.early_exit.patches.distributed_optimizer import (  # noqa: E402
    places_without_padding,
    repair_fully_reshardable_format,
)


def buffer(**attributes) -> SimpleNamespace:
    """Two buckets of 4 with padding of 1 and 2, with a parameter in each."""
    buckets = [
        SimpleNamespace(grad_data=torch.empty(4), numel_unpadded=unpadded) for unpadded in (3, 2)
    ]
    return SimpleNamespace(buckets=buckets, **attributes)


def test_places_have_no_padding_for_a_while() -> None:
    padded = {"first": (0, 3, 0), "second": (4, 6, 1)}
    one = buffer(param_index_map=padded)
    with places_without_padding([one]):
        assert one.param_index_map == {"first": (0, 3, 0), "second": (3, 5, 1)}
    assert one.param_index_map is padded


def test_places_of_another_version_are_an_error_and_stay() -> None:
    before: dict = {}
    known = buffer(param_index_map=before)
    moved = buffer(param_index_map=SimpleNamespace(items=before.items))
    with (
        pytest.raises(RuntimeError, match=r"param_index_map is SimpleNamespace.*not supported"),
        places_without_padding([known, moved]),
    ):
        pass
    assert known.param_index_map is before


def test_another_version_of_megatron_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(distributed_optimizer, "IS_KNOWN_VERSION", False)
    with pytest.raises(RuntimeError, match="--dist-ckpt-optim-fully-reshardable is not supported"):
        repair_fully_reshardable_format.__wrapped__()
