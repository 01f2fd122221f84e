"""Averages over an interval of Megatron's log."""

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loop.logging import _join  # noqa: E402


def logged(first: int, interval: int = 6) -> float:
    """What Megatron's console shows of an exit that learns from the iteration `first` on, with a
    mean of 3 in each."""
    totals: dict[str, object] = {}
    for number in range(interval):
        means = {"exit 1 loss": torch.tensor(3.0)} if number >= first else {}
        _join(means, totals)
        # As in `training_log`.
        totals["advanced iterations"] = totals.get("advanced iterations", 0) + 1
        for name, mean in means.items():
            totals[name] = totals.get(name, torch.tensor(0.0)) + mean
    return float(totals["exit 1 loss"]) / totals["advanced iterations"]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_an_exit_that_begins_within_an_interval_is_not_diluted(first):
    assert logged(first) == pytest.approx(3.0)
