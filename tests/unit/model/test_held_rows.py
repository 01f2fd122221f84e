"""Tokens that layers hand on: gradients are those of a plain masked forward, by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.model.held_rows import HeldRows, unpack  # noqa: E402
from megatron.early_exit.training.loop.step import LossChecks, final_loss  # noqa: E402
from megatron.early_exit.training.loss.exit_loss import (  # noqa: E402
    ExitObjective,
    LossNormalization,
)
from tests.helpers.exit_models import (  # noqa: E402
    BATCH,
    LAYERS,
    SEQUENCE,
    Microbatch,
    PlainExits,
    build_model,
    gradients,
)
from tests.helpers.plain_loss import relative_error  # noqa: E402

BOUND = 1e-5


pytestmark = pytest.mark.usefixtures("process_groups")


def random_rows(exits: EarlyExitConfig, freezes: bool, skips: bool) -> HeldRows:
    """Tokens that leave at any of the exits or at none, and layers that sequences skip."""
    generator = torch.Generator().manual_seed(5)
    choices = torch.tensor([*exits.positions, LAYERS])
    drawn = choices[torch.randint(len(choices), (BATCH, SEQUENCE), generator=generator)]
    skipped = torch.tensor([[False, True, False, True], [False, False, True, False]])
    return HeldRows(
        drawn if freezes else torch.full_like(drawn, LAYERS),
        skipped if skips else torch.zeros_like(skipped),
    )


class PlainHeld(PlainExits):
    """The layers of an ordinary model, one after the other, each blended with its input."""

    def run_backbone(self, batch: Microbatch) -> Tensor:
        model = self.model
        hidden = model.embedding(batch.tokens, batch.positions)
        rope = model.rotary_pos_emb(SEQUENCE)
        for index, layer in enumerate(model.decoder.layers):
            after, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rope)
            for sequence in range(BATCH):
                for token in range(SEQUENCE):
                    has_left = batch.held.frozen_at[sequence, token] <= index
                    if has_left or batch.held.skipped[sequence, index]:
                        after = after.clone()
                        after[token, sequence] = hidden[token, sequence]
            hidden = self.hidden[index + 1] = after
        logits, _ = model.output_layer(
            model.decoder.final_layernorm(hidden),
            weight=model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else None,
        )
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.t().flatten(), reduction="none"
        )
        counts = batch.mask * (batch.held.frozen_at == LAYERS)
        return (losses * counts.t().flatten()).sum()


HEADS = {
    "plain": {},
    "norm-block": {"use_exit_norm": True, "use_exit_block": True},
    "final-head": {"share_final_head": True},
}
RECOMPUTE = {
    "stored": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 3,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


def check(
    exits: EarlyExitConfig, held: HeldRows, *, per_token: bool = False, **backbone: Any
) -> None:
    recompute = {n: v for n, v in backbone.items() if n.startswith("recompute_")}
    plain_backbone = {n: v for n, v in backbone.items() if n not in recompute}
    model = build_model(exits, holds_rows=True, **backbone)
    plain = PlainHeld(build_model(exits, **plain_backbone), exits)
    plain.model.load_state_dict(model.state_dict())
    batch = Microbatch(0, held)
    plain.objective(batch, per_token).backward()
    expected = gradients(plain.model)

    normalization = LossNormalization(per_token=per_token, context_parallel_size=1)
    model.exit_tap = ExitObjective(exits, normalization, 5)
    losses = model(
        batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=batch.mask, held=held
    )
    checks = LossChecks(finite=True, spikes=False)
    total, tokens, _ = final_loss(checks, batch.mask, losses, held.asked_at(LAYERS))
    assert tokens == batch.mask.sum()
    (total if per_token else total / tokens).backward()
    found = gradients(model)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert all(expected[name].any() for name in expected), "a parameter without a gradient"
    assert max(errors.values()) < BOUND, errors


def exits_at(*positions: int, **options: Any) -> EarlyExitConfig:
    weights = tuple(0.3 * (i + 1) for i in range(len(positions)))
    return EarlyExitConfig(exit_layer_nums=positions, exit_layer_weight=weights, **options)


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("freezes", "skips"),
    [(True, False), (False, True), (True, True)],
    ids=["freezes", "skips", "both"],
)
def test_gradients(freezes, skips, heads, recompute):
    exits = exits_at(1, 2, 3, **heads)
    check(exits, random_rows(exits, freezes, skips), **recompute)


@pytest.mark.parametrize(
    "backbone", [{"fp32_residual_connection": True}, {"tied": False}], ids=["fp32", "untied"]
)
def test_other_backbones_and_sums(backbone):
    exits = exits_at(1, 3, use_exit_norm=True)
    check(exits, random_rows(exits, True, True), per_token=True, **backbone)


def test_exits_before_their_layers_are_the_same():
    plain = exits_at(1, 2)
    held = random_rows(plain, True, True)
    weights = build_model(plain).state_dict()
    found = []
    for config in (plain, plain.placed(pre_exit=True)):
        model = build_model(config, holds_rows=True)
        model.load_state_dict(weights)
        objective = ExitObjective(
            config, LossNormalization(per_token=True, context_parallel_size=1)
        )
        model.exit_tap = objective
        batch = Microbatch(0)
        model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.labels,
            loss_mask=batch.mask,
            held=held,
        ).sum().backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        assert relative_error(found[1][name], value) < BOUND, name


def test_without_held_tokens_nothing_changes():
    exits = exits_at(1, 3, use_exit_norm=True)
    plain, holding = build_model(exits), build_model(exits, holds_rows=True)
    holding.load_state_dict(plain.state_dict())
    held = HeldRows(torch.full((BATCH, SEQUENCE), LAYERS), torch.zeros(BATCH, LAYERS).bool())
    batch = Microbatch(0)
    call = (batch.tokens, batch.positions, None)
    targets = {"labels": batch.labels, "loss_mask": batch.mask}
    expected = plain(*call, **targets)
    assert torch.equal(holding(*call, **targets), expected)
    assert torch.equal(holding(*call, **targets, held=held), expected)


def test_packing():
    held = HeldRows(torch.tensor([[1, 4, 3]]), torch.tensor([[False, True, False, True]]))
    mask = torch.tensor([[0.5, 0.0, 1.0]])
    found_mask, found = unpack(held.pack(mask), 4)
    assert torch.equal(found_mask, mask)
    assert torch.equal(found.frozen_at, held.frozen_at)
    assert torch.equal(found.skipped, held.skipped)
    assert unpack(held.pack(None), 4)[1].of_layer(3).tolist() == [[True, False, False]]
    assert found.of_layer(4).all()
    assert found.asked_at(3).tolist() == [[False, True, True]]
    assert unpack(mask, 4) == (mask, None)
    assert unpack(None, 4) == (None, None)
