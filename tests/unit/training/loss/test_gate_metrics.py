"""The calibration of gates, against a direct computation over all pairs of tokens."""

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loss.gate_metrics import GateMetrics  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")


def take(metrics: GateMetrics) -> dict[str, float]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["dp_cp", "pp"])
    found = metrics.take(groups, torch.device("cpu"))
    return {name: float(value) for name, value in found.items()}


def test_figures_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    metrics = GateMetrics((2, 5))
    # In the middles of bins, so that draws are draws.
    confidence = (torch.randint(128, (300,), generator=generator) + 0.5) / 128
    agrees = (torch.rand(300, generator=generator) < confidence).float()
    mask = (torch.rand(300, generator=generator) < 0.8).float()
    loss = torch.rand(300, generator=generator)
    for part in (slice(0, 100), slice(100, 300)):
        metrics.add(5, confidence[part], loss[part], agrees[part], mask[part])
    kept = mask.bool()
    surer = confidence[kept & agrees.bool()].unsqueeze(1)
    others = confidence[kept & ~agrees.bool()]
    pairs = (surer > others).float() + (surer == others).float() / 2
    assert (surer == others).any()
    found = take(metrics)
    assert found["exit 5 gate AUC"] == pytest.approx(float(pairs.mean()), rel=1e-6)
    right = ((confidence >= 0.5) == agrees.bool())[kept].float().mean()
    assert found["exit 5 gate accuracy"] == pytest.approx(float(right), rel=1e-6)
    assert found["exit 5 gate loss"] == pytest.approx(float(loss[kept].mean()), rel=1e-6)
    assert found["exit 2 gate loss"] == 0


@pytest.mark.parametrize(
    ("confidence", "agrees", "auc", "accuracy"),
    [
        ([0.0, 1.0], [0.0, 1.0], 1.0, 1.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0, 0.0),
        ([0.5, 0.5], [0.0, 1.0], 0.5, 0.5),
        ([0.2, 0.7], [1.0, 1.0], 0.5, 0.5),
    ],
)
def test_ends_of_the_range_and_tokens_of_one_kind(confidence, agrees, auc, accuracy):
    metrics = GateMetrics((1,))
    ones = torch.ones(2)
    metrics.add(1, torch.tensor(confidence), ones, torch.tensor(agrees), ones)
    found = take(metrics)
    assert (found["exit 1 gate AUC"], found["exit 1 gate accuracy"]) == (auc, accuracy)
