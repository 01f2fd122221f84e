"""Gates get the gradients of plain autograd, and leave all others as they are without gates."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.model.held_rows import HeldRows  # noqa: E402
from megatron.early_exit.training.loss.curriculum import (  # noqa: E402
    CurriculumOptions,
    LossCurriculum,
)
from megatron.early_exit.training.loss.exit_loss import (  # noqa: E402
    ExitObjective,
    LossNormalization,
)
from megatron.early_exit.training.loss.final_tokens import FinalTokens  # noqa: E402
from megatron.early_exit.training.tuning.objective import LocalObjective  # noqa: E402
from tests.helpers.exit_models import (  # noqa: E402
    BATCH,
    LAYERS,
    SEQUENCE,
    Microbatch,
    build_model,
    gradients,
)
from tests.helpers.plain_gates import PlainGates, with_varied_agreement  # noqa: E402
from tests.helpers.plain_loss import relative_error  # noqa: E402

BOUND = 1e-5
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm and mlp": {"use_exit_norm": True, "use_exit_mlp": True},
    "block": {"use_exit_norm": True, "use_exit_block": True, "untie_exit_output_weights": True},
    "final head": {"share_final_head": True},
    "few answers": {"exit_vocab_size": 24},
    "before layers": {"use_exit_norm": True, "pre_exit": True},
}


pytestmark = pytest.mark.usefixtures("process_groups")


def exits(kind: str, **others: Any) -> EarlyExitConfig:
    numbers = (2, 4) if HEADS[kind].get("pre_exit") else (1, 3)
    return EarlyExitConfig(
        exit_layer_nums=numbers,
        exit_layer_weight=(0.3, 0.6),
        use_exit_gate=True,
        **HEADS[kind],
        **others,
    )


def model_of(config: EarlyExitConfig, **backbone: Any) -> Any:
    return with_varied_agreement(build_model(config, **backbone))


def deferred(
    config: EarlyExitConfig,
    model: Any,
    batches: list[Microbatch],
    per_token: bool = False,
    scale: float = 1.0,
    curriculum: LossCurriculum | None = None,
) -> tuple[ExitObjective, dict[str, torch.Tensor]]:
    """All forward passes, then all backward passes."""
    normalization = LossNormalization(per_token=per_token, context_parallel_size=1)
    options = {"chunk_tokens": 5, "curriculum": curriculum}
    model.exit_tap = objective = ExitObjective(config, normalization, **options)
    objective.start_iteration(0)
    losses = []
    for batch in batches:
        objective.set_loss_scale(torch.tensor([scale]))
        loss = batch.final_loss(model)
        losses.append(loss if per_token else loss / batch.tokens_that_count)
    for loss in losses:
        (scale * loss).backward()
    return objective, gradients(model)


def expected_of_gates(
    config: EarlyExitConfig,
    model: Any,
    batches: list[Microbatch],
    per_token: bool = False,
    scale: float = 1.0,
    **backbone: Any,
) -> dict[str, torch.Tensor]:
    plain = build_model(config, **backbone)
    plain.load_state_dict(model.state_dict())
    for batch in batches:
        loss = torch.stack([*PlainGates(plain, config).gate_losses(batch).values()]).sum()
        (scale * loss / (1 if per_token else batch.tokens_that_count)).backward()
    return {name: found for name, found in gradients(plain).items() if ".gate." in name}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert len(expected) == 4
    assert all(gradient.any() for gradient in expected.values())
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_plain_autograd_and_others_stay(kind, per_token):
    config, batches = exits(kind), [Microbatch(0), Microbatch(1)]
    model = model_of(config)
    expected = expected_of_gates(config, model, batches, per_token, scale=0.5)
    _, found = deferred(config, model, batches, per_token, scale=0.5)
    check(found, expected)
    without = replace(config, use_exit_gate=False)
    plain = build_model(without)
    plain.load_state_dict(model.state_dict(), strict=False)
    _, others = deferred(without, plain, batches, per_token, scale=0.5)
    assert others.keys() == found.keys() - expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in others.items())


@pytest.mark.parametrize("kind", ["plain", "block", "final head"])
def test_tokens_that_are_frozen_on_their_way_teach_no_gate(kind):
    config = exits(kind)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for seed in range(2):
        drawn = torch.randint(3, (BATCH, SEQUENCE), generator=generator)
        held = HeldRows(
            frozen_at=torch.tensor([1, 3, LAYERS])[drawn],
            skipped=torch.rand(BATCH, LAYERS, generator=generator) < 0.2,
        )
        batches.append(Microbatch(seed, held))
    model = model_of(config, holds_rows=True)
    expected = expected_of_gates(config, model, batches, holds_rows=True)
    objective, found = deferred(config, model, batches)
    check(found, expected)
    assert objective.training_metrics.gates is not None
    counts = objective.training_metrics.gates._counts
    assert counts.sum((1, 2)).tolist() == [sum(b.mask_at(LAYERS).sum() for b in batches)] * 2
    free = [Microbatch(batch.seed) for batch in batches]
    others = expected_of_gates(config, model, free, holds_rows=True)
    assert any(relative_error(others[name], expected[name]) > 0.01 for name in expected)


def test_gates_learn_when_their_exits_do():
    config, batches = exits("norm and mlp"), [Microbatch(0), Microbatch(1)]
    model = model_of(config)
    expected = expected_of_gates(config, model, batches)
    curriculum = LossCurriculum(
        options=CurriculumOptions(exit_curriculum="rotational"),
        positions=config.positions,
        num_layers=LAYERS,
        iterations=lambda: 4,
    )
    objective, found = deferred(config, model, batches, curriculum=curriculum)
    for name in expected:
        if name.startswith("exits.heads.1.") or ".1." in name:
            assert relative_error(found[name], expected[name]) < BOUND
        else:
            assert not found[name].any(), name
    groups = model.pg_collection
    but = objective.yet_to_learn
    means = objective.training_metrics.take_means(groups, torch.device("cpu"), but)
    assert but == {3}
    assert len(means) == 5
    assert all(name.startswith("exit 1 ") for name in means)


def test_exits_agree_now_and_then():
    """Else the tests would know one kind of token only."""
    config = exits("final head")
    plain = PlainGates(model_of(config), config)
    for agrees in plain.agreement(Microbatch(0)).values():
        assert 0 < agrees.sum() < len(agrees)


@pytest.mark.parametrize(
    "recompute",
    [
        {"granularity": "full", "method": "uniform", "num_layers": 1},
        {"granularity": "selective", "modules": ["core_attn"]},
    ],
    ids=lambda options: options["granularity"],
)
def test_recomputed_activations_know_their_microbatch(recompute):
    config, batches = exits("final head"), [Microbatch(0), Microbatch(1)]
    options = {f"recompute_{name}": value for name, value in recompute.items()}
    model = model_of(config, **options)
    expected = expected_of_gates(config, model, batches)
    _, found = deferred(config, model, batches)
    check(found, expected)


@pytest.mark.parametrize("kind", ["final head", "norm and mlp"])
def test_tuning(kind):
    config, batch = exits(kind), Microbatch(0)
    model = model_of(config)
    expected = expected_of_gates(config, model, [batch])
    state = model.state_dict()
    model = build_model(config)
    model.tune_exits(freeze_projections=False)
    model.load_state_dict(state, strict=False)
    model.train()
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    model.exit_tap = objective = LocalObjective(config, normalization, 5)
    objective.start_iteration(0)
    objective.set_loss_scale(torch.tensor([1.0]))
    with torch.no_grad():
        batch_of = {"labels": batch.labels, "loss_mask": batch.mask}
        objective.finish_forward(model(batch.tokens, batch.positions, None, **batch_of))
    objective.backpropagate_passed_exits()
    found = gradients(model)
    check(found, expected)
    trained = {name for name, gradient in found.items() if gradient.any()}
    assert all(name.startswith("exits.") for name in trained)
    if kind == "final head":
        assert trained == expected.keys()


@pytest.mark.parametrize("training", [True, False])
def test_what_is_measured(training):
    config, batches = exits("final head"), [Microbatch(0), Microbatch(1)]
    model = model_of(config)
    plain = PlainGates(model_of(config), config)
    plain.model.load_state_dict(model.state_dict())
    kinds: dict[int, list[Any]] = {position: [] for position in config.positions}
    for batch in batches:
        for position, agrees in plain.agreement(batch).items():
            mask = batch.mask.t().flatten().bool()
            confidence = plain.confidence(position)
            kinds[position] += zip(confidence[mask].tolist(), agrees[mask].tolist(), strict=True)
    if training:
        objective, _ = deferred(config, model, batches)
        metrics = objective.training_metrics
    else:
        normalization = LossNormalization(per_token=False, context_parallel_size=1)
        model.exit_tap = objective = ExitObjective(config, normalization)
        model.eval()
        with torch.no_grad():
            for batch in batches:
                batch.final_loss(model)
        metrics = objective.validation_metrics
    found = metrics.take_means(model.pg_collection, torch.device("cpu"))
    for position, tokens in kinds.items():
        surer = [c for c, agrees in tokens if agrees]
        others = [c for c, agrees in tokens if not agrees]
        # Pairs within one of 128 bins count half.
        bins = [(int(128 * a), int(128 * b)) for a in surer for b in others]
        pairs = [(a > b) + (a == b) / 2 for a, b in bins]
        right = sum((c >= 0.5) == agrees for c, agrees in tokens)
        assert len(found) == 5 * len(config.positions)
        assert found[f"exit {position} gate accuracy"] == pytest.approx(right / len(tokens))
        auc = float(found[f"exit {position} gate AUC"])
        assert auc == pytest.approx(sum(pairs) / len(pairs))
        loss = -sum(torch.tensor(c if agrees else 1 - c).log() for c, agrees in tokens)
        assert float(found[f"exit {position} gate loss"]) == pytest.approx(
            float(loss) / len(tokens), rel=1e-5
        )
    again = metrics.take_means(model.pg_collection, torch.device("cpu"))
    assert again == found


class WithoutFinalHead:
    """The tap of exits on an earlier stage than the final head's: they do not see its tokens."""

    def __init__(self, objective: ExitObjective) -> None:
        self.objective = objective

    def __call__(self, exits, position, hidden, labels, mask, final_tokens, *others):
        assert final_tokens is not None
        return self.objective(exits, position, hidden, labels, mask, None, *others)

    def keep_final_tokens(self, exits, logits, final_tokens):
        self.objective.keep_final_tokens(exits, logits, final_tokens)


@pytest.mark.parametrize("delay", [1, 2, 9])
def test_validation_of_earlier_stages_waits_for_tokens(delay):
    """And ends when Megatron has already begun to train again, where heads have dropout."""
    config, batches = exits("norm and mlp"), [Microbatch(seed) for seed in range(4)]
    model = model_of(config, hidden_dropout=0.3)
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    expected, found = (ExitObjective(config, normalization) for _ in range(2))
    found.connect(FinalTokens((1, 3), sender=0, delay=delay))
    for tap in (expected, WithoutFinalHead(found)):
        model.exit_tap = tap
        with torch.no_grad():
            for batch in batches:
                batch.final_loss(model.eval())
    waiting = {len(one) for one in found._of_other_passes.values()}
    assert waiting == {min(delay, len(batches))}
    model.train()
    groups, device = model.pg_collection, torch.device("cpu")
    means = [one.take_means(groups, device, training=False) for one in (expected, found)]
    assert len(means[0]) == 10
    assert means[1] == means[0]
    assert all(module.training for module in model.exits.modules())
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_microbatches_that_end_before_the_final_head_teach_exits_only():
    config, batch = exits("norm and mlp"), Microbatch(0)
    model = model_of(config)
    found = []
    for reaches_final_head in (True, False):
        normalization = LossNormalization(per_token=False, context_parallel_size=1)
        objective = ExitObjective(config, normalization, 5)
        model.exit_tap = WithoutFinalHead(objective)
        final_tokens = FinalTokens((1, 3), sender=0)
        objective.connect(final_tokens)
        objective.start_iteration(0)
        objective.set_loss_scale(torch.tensor([1.0]))
        objective.learning_stages = ()
        loss = batch.final_loss(model) / batch.tokens_that_count
        objective.reaches_final_head = reaches_final_head
        loss.backward()
        assert bool(final_tokens._tokens) != reaches_final_head
        found.append(gradients(model))
    for name, taught in found[0].items():
        if ".gate." in name:
            assert taught.any()
            assert not found[1][name].any()
        else:
            assert torch.equal(found[1][name], taught)
