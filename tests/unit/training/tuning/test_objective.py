"""EE-Tuning gives the exits the gradients of plain autograd, and the backbone none."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.loss.exit_loss import LossNormalization  # noqa: E402
from megatron.early_exit.training.tuning.objective import (  # noqa: E402
    DistillingObjective,
    LocalObjective,
)
from megatron.early_exit.training.tuning.options import TuningOptions  # noqa: E402
from tests.helpers.exit_models import (  # noqa: E402
    Microbatch,
    PlainExits,
    build_model,
    gradients,
)
from tests.helpers.plain_loss import relative_error, token_losses  # noqa: E402

BOUND = 1e-5
HEADS = {
    "norm": {"use_exit_norm": True},
    "projection": {"untie_exit_output_weights": True},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True, "untie_exit_output_weights": True},
    "block": {"use_exit_block": True, "use_exit_norm": True},
    "all, weighted": {
        "use_exit_mlp": True,
        "use_exit_block": True,
        "use_exit_norm": True,
        "untie_exit_output_weights": True,
        "use_dynamic_exit_layer_weight": True,
        "exit_layer_temperature": (2.0, 0.7),
    },
}


pytestmark = pytest.mark.usefixtures("process_groups")


def exits(kind: str) -> EarlyExitConfig:
    return EarlyExitConfig(
        exit_layer_nums=(1, 3),
        exit_layer_weight=(0.3, 1.5),
        **HEADS[kind],  # type: ignore[arg-type]
    )


def references(config: EarlyExitConfig, freeze_projections: bool = False) -> tuple[Any, PlainExits]:
    """A model that is tuned, and one with the same weights for plain autograd."""
    plain = build_model(config)
    tuned = build_model(config)
    tuned.tune_exits(freeze_projections)
    tuned.load_state_dict(plain.state_dict(), strict=False)
    return tuned.train(), PlainExits(plain, config)


def forward(model: Any, batch: Microbatch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=batch.mask)


def check(found: dict[str, Any], expected: dict[str, Any], frozen: tuple[str, ...] = ()) -> None:
    own = [name for name in expected if name.startswith("exits.") and not name.endswith(frozen)]
    assert own
    errors = {name: relative_error(found[name], expected[name]) for name in own}
    assert all(expected[name].any() for name in own)
    assert max(errors.values()) < BOUND, errors
    assert not any(found[name].any() for name in found if name not in own)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_local_losses(kind, per_token):
    config = exits(kind)
    tuned, plain = references(config)
    normalization = LossNormalization(per_token=per_token, context_parallel_size=1)
    tuned.exit_tap = objective = LocalObjective(config, normalization, 5)
    objective.set_loss_scale(torch.tensor([0.5]))
    batches = [Microbatch(0), Microbatch(1)]
    for batch in batches:
        forward(tuned, batch)
        objective.backpropagate_passed_exits()
        (0.5 * plain.objective(batch, per_token)).backward()
    check(gradients(tuned), gradients(plain.model))


def test_exits_may_learn_after_further_forwards():
    """In the order of the microbatches."""
    config = exits("norm")
    tuned, _ = references(config)
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    tuned.exit_tap = objective = LocalObjective(config, normalization, 5)
    found = []
    for ahead in (0, 1):
        forward(tuned, Microbatch(0))
        for seed in (1, 2):
            if ahead:
                forward(tuned, Microbatch(seed))
            objective.backpropagate_passed_exits()
            found.append(gradients(tuned))
            if not ahead:
                forward(tuned, Microbatch(seed))
        objective.backpropagate_passed_exits()
        found.append(gradients(tuned))
    for at_once, later in zip(found[:3], found[3:], strict=True):
        assert any(gradient.any() for gradient in at_once.values())
        assert all(torch.equal(later[name], at_once[name]) for name in at_once)
    assert not all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_frozen_projections():
    config = exits("mlp")
    tuned, plain = references(config, freeze_projections=True)
    tuned.exit_tap = objective = LocalObjective(
        config, LossNormalization(per_token=False, context_parallel_size=1)
    )
    forward(tuned, Microbatch(0))
    objective.backpropagate_passed_exits()
    plain.objective(Microbatch(0)).backward()
    check(gradients(tuned), gradients(plain.model), frozen=("projection.weight",))


@pytest.mark.parametrize("kind", ["norm", "all, weighted"])
def test_distillation(kind):
    config = exits(kind)
    tuned, plain = references(config)
    options = TuningOptions(
        tune_exit=True, exit_distillation_weight=0.6, exit_distillation_temperature=2.5
    )
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    tuned.exit_tap = objective = DistillingObjective(options, config, normalization, 5)
    batch = Microbatch(0)
    final = forward(tuned, batch)
    objective.finish_forward(final)
    objective.backpropagate_passed_exits()

    plain.objective(batch)
    labels, mask = batch.labels.t().flatten(), batch.mask.t().flatten()
    teacher = functional.log_softmax(final.transpose(0, 1).flatten(0, 1) / 2.5, dim=-1)
    for one in config.exits:
        logits = plain._logits(one.position).flatten(0, 1)
        weighted = config.use_dynamic_exit_layer_weight
        plain_losses = token_losses(
            logits, labels, temperature=one.temperature, confidence_weighted=weighted
        )
        own = functional.log_softmax(logits / 2.5, dim=-1)
        divergence = (teacher.exp() * (teacher - own)).sum(dim=-1) * 2.5**2
        if weighted:
            divergence = divergence * torch.softmax(logits.detach() / one.temperature, -1).amax(-1)
        losses = 0.4 * plain_losses + 0.6 * divergence
        (one.weight * (losses * mask).sum() / batch.tokens_that_count).backward(retain_graph=True)
    check(gradients(tuned), gradients(plain.model))


def test_the_backbone_computes_what_it_does_in_inference():
    """Dropout is the exits' own, and their losses are only measured in evaluation."""
    config = exits("all, weighted")
    model = build_model(config, hidden_dropout=0.5, attention_dropout=0.5)
    model.tune_exits(freeze_projections=False)
    model.train()
    assert model.exits.training
    assert not any(module.training for module in model.decoder.modules())
    batch = Microbatch(0)
    first, second = forward(model, batch), forward(model, batch)
    assert torch.equal(first, second)
    model.exit_tap = objective = LocalObjective(
        config, LossNormalization(per_token=False, context_parallel_size=1)
    )
    model.eval()
    forward(model, batch)
    assert not any(gradient.any() for gradient in gradients(model).values())
    assert objective.validation_metrics.positions == (1, 3)
