"""The weights of the exits' losses over the course of training."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.training.loss.loss_weight import exit_loss_weights

STYLES = ("linear", "cosine")
weights = st.floats(0, 10)
styles = st.sampled_from(STYLES)


def one_exit(first: float, last: float, iterations: int, style: str = "linear") -> EarlyExitConfig:
    return EarlyExitConfig(
        exit_layer_nums=(3,),
        exit_layer_weight=(last,),
        exit_layer_weight_init=(first,),
        exit_layer_weight_warmup_iters=iterations,
        exit_layer_weight_warmup_style=style,
    )


def weight(config: EarlyExitConfig, iteration: int) -> float:
    return exit_loss_weights(config, iteration)[3]


@given(last=weights, iteration=st.integers(0, 1000))
def test_without_warmup_weights_are_final_at_once(last, iteration):
    assert weight(one_exit(0.0, last, 0), iteration) == pytest.approx(last)


@given(first=weights, last=weights, style=styles, iterations=st.integers(1, 500))
def test_weights_move_from_one_end_to_the_other(first, last, style, iterations):
    config = one_exit(first, last, iterations, style)
    path = [weight(config, i) for i in range(iterations + 1)]
    assert path[0] == pytest.approx(first)
    assert path[-1] == pytest.approx(last)
    assert weight(config, 10 * iterations) == pytest.approx(last)
    rising = sorted(path) if last >= first else sorted(path, reverse=True)
    assert path == pytest.approx(rising)


@given(first=weights, last=weights, style=styles, iterations=st.integers(1, 500))
def test_paths_are_symmetric(first, last, style, iterations):
    config = one_exit(first, last, iterations, style)
    for i in range(iterations + 1):
        assert weight(config, i) + weight(config, iterations - i) == pytest.approx(first + last)


def test_shapes():
    assert weight(one_exit(1.0, 3.0, 8), 2) == pytest.approx(1.5)
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert weight(one_exit(1.0, 3.0, 8, "cosine"), 2) == pytest.approx(1 + 2 * quarter)


def test_each_exit_goes_its_own_way():
    config = EarlyExitConfig(
        exit_layer_nums=(4, 2),
        exit_layer_weight=(0.2, 0.1),
        exit_layer_weight_init=(0.0, 0.5),
        exit_layer_weight_warmup_iters=10,
    )
    assert exit_loss_weights(config, 5) == pytest.approx({2: 0.3, 4: 0.1})
    assert list(exit_loss_weights(config, 5)) == [2, 4]


def test_no_exits_have_no_weights():
    assert exit_loss_weights(EarlyExitConfig(), 7) == {}
