"""LayerSkip's curricula and weights, by the formulas of its paper (arXiv 2404.16710)."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.training.loss.curriculum import CurriculumOptions, LossCurriculum

LAYERS, ITERATIONS = 8, 160
EVERY_LAYER = tuple(range(1, LAYERS))


def curriculum(positions: tuple[int, ...] = EVERY_LAYER, **options: Any) -> LossCurriculum:
    return LossCurriculum(
        options=CurriculumOptions(**options),
        positions=positions,
        num_layers=LAYERS,
        iterations=lambda: ITERATIONS,
    )


@pytest.mark.parametrize("period", [2, 3, 10])
def test_rotational(period):
    one = curriculum(exit_curriculum="rotational", exit_curriculum_period=period)
    for iteration in range(3 * period):
        layers = {layer for layer in range(LAYERS - 1) if layer % period == iteration % period}
        assert one.active(iteration) == {layer + 1 for layer in layers}


def test_by_default_exits_take_turns():
    one = curriculum((2, 4, 6), exit_curriculum="rotational")
    assert [one.active(iteration) for iteration in range(4)] == [{2}, {4}, {6}, {2}]


def test_gradual():
    one = curriculum(exit_curriculum="gradual")
    every = ITERATIONS / (2 * LAYERS)
    for iteration in range(ITERATIONS):
        number = min(int(iteration // every), LAYERS - 1)
        assert one.active(iteration) == set(EVERY_LAYER[LAYERS - 1 - number :])
    assert one.active(0) == frozenset()
    assert one.active(ITERATIONS // 2) == set(EVERY_LAYER)


def test_without_a_curriculum_all_learn():
    assert curriculum(exit_loss_scale=0.5).active(3) == set(EVERY_LAYER)


@pytest.mark.parametrize("name", ["none", "rotational", "gradual"])
@pytest.mark.parametrize("positions", [EVERY_LAYER, (2, 5)], ids=str)
def test_scaled_weights(name, positions):
    one = curriculum(positions, exit_curriculum=name, exit_loss_scale=0.2)
    for iteration in (0, 1, 37, 100):
        active = one.active(iteration)
        e = [0.2 * sum(range(layer + 1)) for layer in range(LAYERS - 1)]
        e += [LAYERS - 1 + 0.2 * sum(range(LAYERS - 1))]
        counts = [layer + 1 in active for layer in range(LAYERS - 1)] + [True]
        total = sum(value for value, is_on in zip(e, counts, strict=True) if is_on)
        weights, final = one.weights(dict.fromkeys(positions, 1.0), iteration)
        assert final == pytest.approx(e[-1] / total)
        assert list(weights) == list(positions)
        for position, weight in weights.items():
            expected = e[position - 1] / total if position in active else 0.0
            assert weight == pytest.approx(expected)
        assert final + sum(weights.values()) == pytest.approx(1.0)


def test_other_weights_stay_where_exits_learn():
    one = curriculum((2, 4), exit_curriculum="rotational")
    assert one.weights({2: 0.3, 4: 0.7}, 0) == ({2: 0.3, 4: 0.0}, 1.0)
    assert one.weights({2: 0.3, 4: 0.7}, 1) == ({2: 0.0, 4: 0.7}, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exit_curriculum": "random"},
            "--exit-curriculum 'random' is unknown, allowed: none, rotational, gradual",
        ),
        (
            {"exit_curriculum": "rotational", "exit_curriculum_period": 1},
            "--exit-curriculum-period 1 is out of range, allowed: 2 or more",
        ),
        (
            {"exit_curriculum": "gradual", "exit_curriculum_period": 3},
            "--exit-curriculum-period has no effect without --exit-curriculum rotational",
        ),
        ({"exit_loss_scale": 0.0}, "--exit-loss-scale 0.0 is out of range, allowed: above 0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CurriculumOptions(**options)


ROTATIONAL, SCALE = {"exit_curriculum": "rotational"}, {"exit_loss_scale": 0.1}


@pytest.mark.parametrize(
    ("options", "exits", "args", "message"),
    [
        (ROTATIONAL, {"exit_layer_nums": ()}, {}, "--exit-curriculum has no effect without"),
        (
            SCALE,
            {"exit_layer_nums": ()},
            {},
            "--exit-loss-scale has no effect without --exit-layer",
        ),
        (ROTATIONAL, {}, {"tune_exit": True}, "--tune-exit cannot be combined with --exit-curr"),
        (SCALE, {}, {"tune_exit": True}, "--tune-exit cannot be combined with --exit-loss-scale"),
        (SCALE, {"exit_layer_weight": (1.0, 0.5)}, {}, "cannot be combined with --exit-layer-weig"),
        (SCALE, {"exit_layer_weight_warmup_iters": 5}, {}, "cannot be combined with --exit-layer"),
        (SCALE, {"exit_layer_nums": (2, 8)}, {}, "with an exit after the last layer"),
    ],
)
def test_flags_that_do_not_fit(options, exits, args, message):
    config = EarlyExitConfig(**{"exit_layer_nums": (2, 4), **exits})
    with pytest.raises(ValueError, match=message):
        CurriculumOptions(**options).check(Namespace(**{"num_layers": LAYERS, **args}), config)


def test_flags_that_fit():
    config = EarlyExitConfig(exit_layer_nums=(2, 4))
    for options in (ROTATIONAL, SCALE, ROTATIONAL | SCALE):
        CurriculumOptions(**options).check(Namespace(num_layers=LAYERS), config)
    CurriculumOptions().check(Namespace(num_layers=LAYERS, tune_exit=True), EarlyExitConfig())
