"""Gradients of filled steps over a pipeline are those of their definition on one process.

The definition: each loss of each microbatch that contributes, one by one, by plain autograd, with
the weights by which filled steps are unbiased. Gates learn from those that the final head sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.exit_models import Microbatch as Batch
from tests.helpers.exit_models import PlainExits, build_model, gradients
from tests.helpers.filled_stage import FilledStage
from tests.helpers.nccl_transfers import NcclTransfers
from tests.helpers.plain_gates import PlainGates, with_varied_agreement
from tests.helpers.plain_loss import relative_error
from tests.helpers.single_process import model_parallel
from tests.helpers.spawn import spawn

BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """A pipeline and what it is filled with.

    `depths` are those of the fills, on how many of the first or of the last stages they run back:
    written down here by hand from the paper's figure."""

    layers: tuple[int, ...]
    exits: tuple[int, ...]
    num_full: int
    warmup_depths: tuple[int, ...]
    cooldown_depths: tuple[int, ...]
    pre_exit: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    per_token: bool = False
    holding: dict[str, Any] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def config(self) -> EarlyExitConfig:
        numbers = tuple(number + self.pre_exit for number in self.exits)
        weights = tuple(0.3 + 0.4 * i for i in range(len(self.exits)))
        return EarlyExitConfig(
            exit_layer_nums=numbers,
            pre_exit=self.pre_exit,
            exit_layer_weight=weights,
            **self.fields,
        )

    def stage_of_layer(self, number: int) -> int:
        """`number` counts from 1."""
        return next(s for s in range(self.num_stages) if number <= sum(self.layers[: s + 1]))

    def stage_of_exit(self, position: int) -> int:
        return self.stage_of_layer(position + self.pre_exit)

    @property
    def exit_stages(self) -> frozenset[int]:
        return frozenset(map(self.stage_of_exit, self.exits))

    @property
    def held_draws(self) -> Any:
        """What layers hand on, if anything."""
        from megatron.early_exit.training.loop.held_draws import HeldDraws
        from megatron.early_exit.training.loop.holding_options import HoldingOptions

        if not self.holding:
            return None
        batch, length = Batch(0).tokens.shape
        return HeldDraws(
            options=HoldingOptions(**self.holding),
            num_layers=sum(self.layers),
            positions=self.exits,
            seed=3,
            iterations=lambda: 1,
            micro_batch_size=batch,
            seq_length=length,
            data_parallel_rank=0,
            data_parallel_size=1,
        )

    @property
    def num_batches(self) -> int:
        return self.num_full + len(self.warmup_depths) + len(self.cooldown_depths)


CASES = {
    # A stage more than fits, which costs time and must be as right.
    "pp2": Case((2, 2), (1, 3), 3, (1,), (1,)),
    "pp2-untied": Case(
        (2, 2),
        (1, 2),
        2,
        (1,),
        (1,),
        fields={"untie_exit_output_weights": True, "use_exit_norm": True, "use_exit_mlp": True},
        backbone={"tied": False},
    ),
    "pp2-per-token": Case(
        (2, 2), (1, 3), 3, (1,), (1,), per_token=True, fields={"use_exit_gate": True}
    ),
    "pp4": Case((1, 1, 1, 1), (1, 2, 3), 5, (2, 1), (2, 1), fields={"use_exit_gate": True}),
    # The paper's placement: the second fill of the warm-up would reach no exit.
    "pp4-pre-exit": Case((1, 1, 1, 1), (1, 2), 4, (2,), (2, 1), pre_exit=True),
    "pp4-uneven": Case(
        (1, 2, 2, 1),
        (2, 3, 6),
        3,
        (2,),
        (2, 1),
        fields={"use_exit_block": True, "use_exit_norm": True},
        backbone={
            "num_layers": 6,
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 1,
        },
    ),
    "pp4-final-head": Case(
        (1, 1, 1, 1),
        (1, 2, 3),
        5,
        (2, 1),
        (2, 1),
        fields={"share_final_head": True},
        backbone={"tied": False},
    ),
    # Stages come to microbatches in different orders, and draw the same for each.
    "pp4-held": Case(
        (1, 1, 1, 1),
        (1, 2, 3),
        5,
        (2, 1),
        (2, 1),
        fields={"use_exit_gate": True},
        backbone={"holds_rows": True},
        holding={"layer_dropout": 0.5, "exit_propagate_prob": 0.4},
        per_token=True,
    ),
    "pp4-recompute": Case(
        (1, 1, 1, 1),
        (1, 2, 3),
        4,
        (2, 1),
        (2, 1),
        fields={"use_exit_gate": True},
        backbone={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


def run_stages(cases: dict[str, Case], weights: Path) -> dict[str, dict[str, Tensor]]:
    """On each rank: the gradients of the second of two filled steps of each case, which finds every
    stage at the same place in the data, although transfers have stopped the ranks in the first as
    NCCL's may."""
    found = {}
    for name, case in cases.items():
        batches = (Batch(seed) for seed in range(2 * case.num_batches))
        with stage_of_pipeline(case, torch.load(weights / name), batches) as stage:
            with NcclTransfers(blocking=True).used() as transfers:
                stage.step(case.num_batches)
            assert transfers.communicators
            found[name], reports = stage.step(case.num_batches)
            on_last = torch.distributed.get_rank() == case.num_stages - 1
            assert reports == (case.num_full + len(case.cooldown_depths)) * on_last
    return found


@contextmanager
def stage_of_pipeline(
    case: Case, weights: dict[str, Tensor], batches: Iterator[Batch]
) -> Iterator[FilledStage]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=case.num_stages)
    first_layer = sum(case.layers[: torch.distributed.get_rank()])
    fills = len(case.warmup_depths), len(case.cooldown_depths)
    backbone = {**case.backbone, "calculate_per_token_loss": case.per_token}
    stage_of_case = (case.config, weights, first_layer, fills, case.exit_stages, backbone, batches)
    yield FilledStage(*stage_of_case, case.held_draws)
    parallel_state.destroy_model_parallel()


class SeparateUses(PlainGates):
    """Where exits share a weight with the backbone, each of its uses gets a gradient of its own, as
    the stages that they are on have.

    `copies` has them by the exits' positions and the weights' names."""

    def __init__(self, model: Any, exits: EarlyExitConfig) -> None:
        super().__init__(model, exits)
        self._matrix = "embedding.word_embeddings.weight"
        shared = [self._matrix]
        if exits.share_final_head:
            self._matrix = "output_layer.weight"
            shared = [self._matrix, "decoder.final_layernorm.weight"]
        self.copies = {
            (position, name): model.get_parameter(name).detach().clone().requires_grad_()
            for position in exits.positions
            for name in shared
        }

    def weight_of(self, position: int) -> Tensor:
        if self.exits.untie_exit_output_weights:
            return super().weight_of(position)
        return self.copies[position, self._matrix]

    def final_norm(self, position: int, hidden: Tensor) -> Tensor:
        gain = self.copies[position, "decoder.final_layernorm.weight"]
        norm = self.model.decoder.final_layernorm
        return torch.func.functional_call(norm, {"weight": gain}, (hidden,))


def reference(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition, for the data of the second step."""
    tied = case.backbone.get("tied", True)
    model = build_model(case.config, **(on_one_process(case.backbone) | {"tied": False}))
    model.load_state_dict(weights, strict=not tied)
    if tied:
        model.output_layer.weight.data.copy_(model.embedding.word_embeddings.weight)
    plain = SeparateUses(model, case.config)
    last = case.num_stages - 1
    parameters: dict[str, tuple[int, str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        whole = "embedding.word_embeddings.weight" if tied and "output_layer" in name else name
        parameters[name] = stage_of(case, name), whole, parameter
    for (position, name), copy in plain.copies.items():
        parameters[f"{name} {position}"] = case.stage_of_exit(position), name, copy
    tensors = [parameter for _, _, parameter in parameters.values()]
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for batch, role, depth in draws(case):
        losses = [(last, plain.run_backbone(batch))]
        losses += [
            (case.stage_of_exit(p), plain.exit_loss(p, batch)) for p in plain.exits.positions
        ]
        for loss_stage, loss in losses:
            if not case.per_token:
                loss = loss / batch.tokens_that_count
            grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
            for (stage, name, _), grad in zip(parameters.values(), grads, strict=True):
                if grad is not None:
                    weight = weigh(case, role, depth, stage, loss_stage)
                    total[name] = total[name] + weight * grad
        if case.config.use_exit_gate:
            for position, loss in plain.gate_losses(batch).items():
                weight = weigh_gate(case, role, depth, case.stage_of_exit(position))
                if not case.per_token:
                    loss = loss / batch.tokens_that_count
                gate = model.exits.heads[position].gate
                names = [f"exits.{position}.gate.{name}" for name, _ in gate.named_parameters()]
                grads = torch.autograd.grad(loss, [*gate.parameters()])
                for name, grad in zip(names, grads, strict=True):
                    total[name] = total[name] + weight * grad
    return dict(total)


def stage_of(case: Case, name: str) -> int:
    if name.startswith("embedding."):
        return 0
    if name.startswith("decoder.layers."):
        return case.stage_of_layer(int(name.split(".")[2]) + 1)
    if name.startswith("exits."):
        return case.stage_of_exit(int(name.split(".")[1]))
    return case.num_stages - 1


def draws(case: Case) -> list[tuple[Batch, str, int]]:
    """The microbatches of the second step in the order in which the first stage goes forward:
    as many full ones as there are stages fill the pipeline, then come the warm-up's fills."""
    roles: list[tuple[str, int]] = [("", 0)] * case.num_full
    roles += [("c", depth) for depth in case.cooldown_depths]
    at = min(case.num_stages, len(roles))
    roles[at:at] = [("w", depth) for depth in case.warmup_depths]
    seeds = range(case.num_batches, 2 * case.num_batches)
    held = case.held_draws
    return [
        (Batch(seed, held and held.draw(0, number)), *role)
        for number, (seed, role) in enumerate(zip(seeds, roles, strict=True))
    ]


def weigh(case: Case, role: str, depth: int, stage: int, loss_stage: int) -> float:
    """Of a microbatch's loss on `loss_stage` for parameters on `stage`."""

    def warmup(at: int) -> int:
        return sum(at < d for d in case.warmup_depths)

    def cooldown(at: int) -> int:
        return sum(at >= case.num_stages - d for d in case.cooldown_depths)

    on_loss_stage = case.num_full + warmup(loss_stage) + cooldown(loss_stage)
    weight = 1 / on_loss_stage
    if case.per_token:
        tokens = sum(batch.mask.sum().item() for batch, role, _ in draws(case) if role != "w")
        weight *= (case.num_full + len(case.cooldown_depths)) / tokens
    if role == "w":
        return weight if loss_stage < depth else 0.0
    if role == "c" and stage < case.num_stages - depth:
        return 0.0
    ends = case.num_full + cooldown(loss_stage), case.num_full + cooldown(stage)
    return weight * ends[0] / ends[1]


def weigh_gate(case: Case, role: str, depth: int, stage: int) -> float:
    """Of the loss of a gate on `stage` in a microbatch. Those of the warm-up teach no gate: the
    final head does not see them."""
    if role == "w" or (role == "c" and stage < case.num_stages - depth):
        return 0.0
    taught = case.num_full + sum(stage >= case.num_stages - d for d in case.cooldown_depths)
    if not case.per_token:
        return 1 / taught
    tokens = sum(batch.mask.sum().item() for batch, role, _ in draws(case) if role != "w")
    return (case.num_full + len(case.cooldown_depths)) / tokens / taught


@pytest.fixture(scope="module", params=[2, 4], ids=["pp2", "pp4"])
def gradients_of(request, tmp_path_factory) -> dict[str, tuple[dict[str, Tensor], ...]]:
    """What was found and what is expected, for each case of a number of stages."""
    cases = {name: case for name, case in CASES.items() if case.num_stages == request.param}
    folder, expected = tmp_path_factory.mktemp("weights"), {}
    with model_parallel():
        for name, case in cases.items():
            model = build_model(case.config, **on_one_process(case.backbone))
            if case.config.use_exit_gate:
                model = with_varied_agreement(model)
            weights = model.state_dict()
            torch.save(weights, folder / name)
            expected[name] = reference(case, weights)
    ranks = spawn(run_stages, request.param, cases, folder)
    return {name: (add_up([rank[name] for rank in ranks]), expected[name]) for name in cases}


def add_up(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of the gradients of all copies of each weight."""
    total: dict[str, Tensor] = {}
    for name, gradient in (item for part in parts for item in part.items()):
        total[name] = total.get(name, 0) + gradient
    return total


def on_one_process(backbone: dict[str, Any]) -> dict[str, Any]:
    """Without what divides layers over stages, or saves memory."""
    return {n: v for n, v in backbone.items() if "layers_in" not in n and "recompute" not in n}


def test_filled_gradients_are_those_of_the_definition(gradients_of):
    for case, (found, expected) in gradients_of.items():
        assert found.keys() == expected.keys()
        assert all(gradient.any() for gradient in expected.values())
        apart = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(apart.values()) < BOUND, (case, apart)


POPULATION = 6
DRAWN_STEPS = 150
# Of normal numbers, one in 300,000 is further from the mean; there are six.
MOST_DEVIATIONS = 4.7


def draw_steps(case: Case, weights: Path, seed: int) -> dict[str, Tensor]:
    """On each rank: one number for each gradient of many steps, on samples drawn by chance."""
    drawn = torch.randint(
        POPULATION, (DRAWN_STEPS * case.num_batches,), generator=torch.Generator().manual_seed(seed)
    )
    batches = (Batch(int(number)) for number in drawn)
    with stage_of_pipeline(case, torch.load(weights), batches) as stage:
        steps = [stage.step(case.num_batches)[0] for _ in range(DRAWN_STEPS)]
    return {
        name: torch.stack([project(step[name]) for step in steps])
        for name in OBSERVED & steps[0].keys()
    }


OBSERVED = {
    f"decoder.layers.{layer}.{rest}"
    for layer in (0, 1, 2)
    for rest in ("mlp.linear_fc2.weight", "self_attention.linear_qkv.weight")
}


def project(gradient: Tensor) -> Tensor:
    """The gradient along a direction drawn by chance, always the same."""
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    return (gradient * direction).sum()


def test_filled_gradients_have_no_bias(tmp_path):
    """Their mean over many steps is the mean over all samples; were the fills' contributions not
    made up for, as in the original, it would be found out."""
    case = CASES["pp2"]
    with model_parallel():
        model = build_model(case.config, **case.backbone)
        torch.save(model.state_dict(), tmp_path / "weights")
        plain = PlainExits(model, case.config)
        for number in range(POPULATION):
            (plain.objective(Batch(number)) / POPULATION).backward()
        expected = {name: project(gradient) for name, gradient in gradients(model).items()}
    found: dict[str, Tensor] = {}
    for rank in spawn(draw_steps, case.num_stages, case, tmp_path / "weights", 11):
        found |= rank
    assert found.keys() == OBSERVED
    deviations = []
    for name, values in found.items():
        error = values.std() / DRAWN_STEPS**0.5
        assert abs(values.mean() - expected[name]) < MOST_DEVIATIONS * error, name
        deviations.append(abs(expected[name] / error))
    # A part of the losses short by one of four contributions would be this far off.
    assert max(deviations) / (case.num_full + 1) > 2 * MOST_DEVIATIONS, deviations
