"""Averages over an interval of Megatron's log."""

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loop.logging import _FinalLoss, _join  # noqa: E402
from megatron.early_exit.training.loop.step import LossChecks, final_loss  # noqa: E402


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


def reduced(masks: list[list[float]], value: float) -> dict[str, torch.Tensor]:
    """What Megatron's training step makes of the reports of some microbatches."""
    checks = LossChecks(finite=False, spikes=False)
    reports = [
        final_loss(checks, torch.ones(1, 2), torch.full((1, 2), value), torch.tensor([mask]))[2]
        for mask in masks
    ]
    sums = {name: sum(report[name] for report in reports) for name in reports[0]}
    return {name: first / second for name, (first, second) in sums.items()}


def test_a_step_of_which_all_tokens_are_frozen_has_no_loss_of_its_own():
    final = _FinalLoss()
    nobody = [[0.0, 0.0], [0.0, 0.0]]
    assert reduced(nobody, 2.0)["lm loss"].isnan()
    assert final.shown(reduced(nobody, 2.0)) == {}
    assert final.shown(reduced([[0.0, 0.0], [1.0, 0.0]], 3.0)) == {"lm loss": 3.0}
    assert final.shown(reduced(nobody, 2.0)) == {"lm loss": 3.0}
    assert final.shown(reduced([[1.0, 1.0], [1.0, 0.0]], 4.0)) == {"lm loss": 4.0}
    # What is not finite, and what other stages have to say, goes as it is.
    assert final.shown(reduced([[1.0, 1.0]], float("nan")))["lm loss"].isnan()
    assert final.shown({}) == {}


def test_a_first_iteration_that_overflows_does_not_stay_in_the_average():
    totals: dict[str, object] = {}
    _join({"exit 1 loss": torch.tensor(float("nan"))}, totals)
    assert totals == {}
