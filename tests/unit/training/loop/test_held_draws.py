"""What layers hand on is drawn with LayerSkip's probabilities, the same in every layout."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.errors import as_flag  # noqa: E402
from megatron.early_exit.training.loop.held_draws import (  # noqa: E402
    HeldDraws,
    dropout_probabilities,
)
from megatron.early_exit.training.loop.holding_options import (  # noqa: E402
    HoldingOptions,
    freezing_positions,
)

LAYERS, SEQUENCE = 8, 40
EXITS = EarlyExitConfig(exit_layer_nums=(2, 4, 8))


def draws(
    micro_batch_size: int = 2, rank: int = 0, size: int = 1, seed: int = 1, **options: Any
) -> HeldDraws:
    return HeldDraws(
        options=HoldingOptions(**options),
        num_layers=LAYERS,
        positions=freezing_positions(EXITS, LAYERS),
        seed=seed,
        iterations=lambda: 100,
        micro_batch_size=micro_batch_size,
        seq_length=SEQUENCE,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_probabilities_are_those_of_the_paper(schedule):
    options = HoldingOptions(layer_dropout=0.3, layer_dropout_schedule=schedule)
    for iteration in (0, 1, 37, 99):
        scale = math.exp(iteration * math.log(2) / 99) - 1 if schedule == "exponential" else 1.0
        expected = [0.3 * scale * (math.exp(i * math.log(2) / 7) - 1) for i in range(LAYERS)]
        found = dropout_probabilities(options, LAYERS, iteration, 100)
        assert found == pytest.approx(expected)
        assert found[0] == 0
    assert found[-1] == pytest.approx(0.3)


def test_how_often_layers_are_skipped():
    source = draws(micro_batch_size=16, layer_dropout=0.6)
    number = 300
    counts = torch.zeros(LAYERS)
    for microbatch in range(number // 16):
        counts += source.draw(3, microbatch).skipped.sum(dim=0)
    total = number // 16 * 16
    expected = torch.tensor(dropout_probabilities(source.options, LAYERS, 3, 100))
    assert counts[0] == 0
    # Five standard deviations.
    bound = 5 * (expected * (1 - expected) / total).sqrt()
    assert ((counts / total - expected).abs() <= bound).all()


def test_how_often_tokens_are_frozen_and_where():
    source = draws(micro_batch_size=100, exit_propagate_prob=0.3)
    held = source.draw(3, 0)
    assert not held.skipped.any()
    total = held.frozen_at.numel()
    for position, chance in [(2, 0.15), (4, 0.15), (LAYERS, 0.7)]:
        share = (held.frozen_at == position).sum() / total
        assert share.item() == pytest.approx(chance, abs=5 * (chance * (1 - chance) / total) ** 0.5)
    assert set(held.frozen_at.unique().tolist()) == {2, 4, LAYERS}


def test_one_option_does_not_change_the_draws_of_the_other():
    both = draws(layer_dropout=0.5, exit_propagate_prob=0.5).draw(1, 2)
    assert torch.equal(both.skipped, draws(layer_dropout=0.5).draw(1, 2).skipped)
    assert torch.equal(both.frozen_at, draws(exit_propagate_prob=0.5).draw(1, 2).frozen_at)


def test_sequences_draw_the_same_on_any_number_of_replicas():
    one = draws(micro_batch_size=8, layer_dropout=0.5, exit_propagate_prob=0.5).draw(4, 0)
    assert (one.frozen_at < LAYERS).any()
    for size, width in [(2, 1), (2, 2), (4, 2), (1, 4)]:
        steps = 8 // (size * width)
        parts = [
            draws(width, rank, size, layer_dropout=0.5, exit_propagate_prob=0.5).draw(4, step)
            for step in range(steps)
            for rank in range(size)
        ]
        assert torch.equal(torch.cat([part.skipped for part in parts]), one.skipped)
        assert torch.equal(torch.cat([part.frozen_at for part in parts]), one.frozen_at)


def test_draws_depend_on_all_that_they_are_a_function_of():
    base = draws(8, layer_dropout=0.9).draw(4, 0)
    others = [
        draws(8, layer_dropout=0.9).draw(5, 0),
        draws(8, layer_dropout=0.9).draw(4, 1),
        draws(8, seed=2, layer_dropout=0.9).draw(4, 0),
        draws(8, rank=1, size=2, layer_dropout=0.9).draw(4, 0),
    ]
    assert torch.equal(base.skipped, draws(8, layer_dropout=0.9).draw(4, 0).skipped)
    assert all(not torch.equal(base.skipped, other.skipped) for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_dropout": -0.1}, "--layer-dropout -0.1 is out of range, allowed: 0 to 1"),
        (
            {"exit_propagate_prob": 1.0},
            "--exit-propagate-prob 1.0 is out of range, allowed: 0 to less than 1",
        ),
        ({"layer_dropout": 1.5}, "--layer-dropout 1.5 is out of range, allowed: 0 to 1"),
        (
            {"layer_dropout_schedule": "exponential"},
            "--layer-dropout-schedule has no effect without --layer-dropout",
        ),
        (
            {"layer_dropout": 0.1, "layer_dropout_schedule": "linear"},
            "--layer-dropout-schedule 'linear' is unknown, allowed: constant, exponential",
        ),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        HoldingOptions(**options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tune_exit": True}, "--tune-exit cannot be combined with --"),
        ({"num_experts": 4}, "--num-experts 4 cannot be combined with --"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 cannot be combined with --"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local cannot be combined with --"),
    ],
)
@pytest.mark.parametrize("name", ["layer_dropout", "exit_propagate_prob"])
def test_flags_that_do_not_fit(name, args, message):
    args = Namespace(**{"num_layers": LAYERS, **args})
    with pytest.raises(ValueError, match=message + as_flag(name).removeprefix("--")):
        HoldingOptions(**{name: 0.1}).check(args, EXITS)


@pytest.mark.parametrize(
    ("name", "exits", "num_layers", "message"),
    [
        ("layer_dropout", EXITS, 1, "--layer-dropout has no effect with --num-layers 1"),
        ("exit_propagate_prob", EarlyExitConfig(), 8, "needs an exit before the last layer"),
        ("exit_propagate_prob", EarlyExitConfig(exit_layer_nums=(8,)), 8, "before the last layer"),
        (
            "exit_propagate_prob",
            EarlyExitConfig(exit_layer_nums=(4,), use_exit_mlp=True),
            8,
            "--use-exit-mlp cannot be combined with --exit-propagate-prob",
        ),
    ],
)
def test_models_that_do_not_fit(name, exits, num_layers, message):
    with pytest.raises(ValueError, match=message):
        HoldingOptions(**{name: 0.1}).check(Namespace(num_layers=num_layers), exits)
