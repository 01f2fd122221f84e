"""Layers of stages: no other numbers of layers make the slowest rank faster."""

from itertools import product
from random import Random

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.model_costs import PartSeconds
from megatron.early_exit.planner.search.stage_layers import chunk_numbers, stage_layers

NO_EXITS = EarlyExitConfig()
EXITS = EarlyExitConfig(exit_layer_nums=(2, 5))


def rank_seconds(
    parts: PartSeconds, exits: EarlyExitConfig, layers: tuple[int, ...], num_ranks: int
) -> list[float]:
    """What each rank takes, layer by layer."""
    seconds = [0.0] * num_ranks
    seconds[0] += parts.embedding_s
    seconds[(len(layers) - 1) % num_ranks] += parts.head_s
    layer = 0
    for stage, number in enumerate(layers):
        for _ in range(number):
            layer += 1
            has_exit = layer in exits.exit_layer_nums
            seconds[stage % num_ranks] += parts.layer_s + has_exit * parts.exit_s
    return seconds


@pytest.mark.parametrize("exits", [NO_EXITS, EXITS, EXITS.placed(True)])
@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 1), (3, 1), (4, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("head_s", [0.3, 1.4, 2.5])
def test_no_other_numbers_are_faster(exits, num_ranks, num_chunks, head_s):
    parts = PartSeconds(layer_s=1.0, embedding_s=0.1, head_s=head_s, exit_s=0.7)
    num_layers, num_stages = 9, num_ranks * num_chunks
    found = list(stage_layers(parts, exits, num_layers, num_ranks, num_chunks))
    assert all(sum(layers) == num_layers and min(layers) >= 1 for layers in found)
    assert {len(layers) for layers in found} == {num_stages}
    every = product(range(1, num_layers), repeat=num_stages)
    best = min(
        max(rank_seconds(parts, exits, layers, num_ranks))
        for layers in every
        if sum(layers) == num_layers
    )
    fastest = min(max(rank_seconds(parts, exits, layers, num_ranks)) for layers in found)
    if exits is NO_EXITS or num_chunks == 1:
        assert fastest == pytest.approx(best)
    else:
        # Where exits are depends on the layers, and the search does not try everything.
        assert fastest <= best + parts.layer_s


def test_a_model_of_126_layers_has_fewer_of_them_at_its_ends():
    parts = PartSeconds(layer_s=1.0, embedding_s=0.01, head_s=0.66, exit_s=0.0)
    (layers,) = stage_layers(parts, NO_EXITS, 126, 16, 1)
    assert layers == (7, *[8] * 14, 7)
    (chunks,) = stage_layers(parts, NO_EXITS, 126, 16, 7)
    assert chunks == (*[1] * 97, *[2] * 14, 1)


def test_even_stages_come_first_and_alone_where_nothing_is_faster():
    light = PartSeconds(layer_s=1.0, embedding_s=0.01, head_s=0.66, exit_s=0.0)
    assert list(stage_layers(light, NO_EXITS, 32, 4, 1)) == [(8,) * 4]
    heavy = PartSeconds(layer_s=1.0, embedding_s=0.01, head_s=3.0, exit_s=0.0)
    assert list(stage_layers(heavy, NO_EXITS, 32, 4, 1)) == [(8,) * 4, (8, 9, 9, 6)]
    assert list(stage_layers(heavy, NO_EXITS, 32, 1, 1)) == [(32,)]


def test_all_numbers_of_stages_are_possible():
    """Also where sums of as many layers differ by rounding."""
    draw = Random(1)
    for _ in range(300):
        num_layers = draw.randint(2, 100)
        num_ranks = draw.randint(2, min(num_layers, 32))
        seconds = [draw.uniform(1e-3, 0.1) for _ in range(4)]
        chosen = draw.sample(range(1, num_layers + 1), min(num_layers, 2))
        exits = EarlyExitConfig(exit_layer_nums=tuple(chosen))
        for layers in stage_layers(PartSeconds(*seconds), exits, num_layers, num_ranks, 1):
            assert (len(layers), sum(layers)) == (num_ranks, num_layers)
            assert min(layers) >= 1


def test_layers_make_way_for_exits():
    parts = PartSeconds(layer_s=1.0, embedding_s=0.0, head_s=1.0, exit_s=2.0)
    exits = EarlyExitConfig(exit_layer_nums=(2, 4))
    (even, uneven) = stage_layers(parts, exits, 16, 4, 1)
    assert even == (4,) * 4
    slowest = [max(rank_seconds(parts, exits, layers, 4)) for layers in (even, uneven)]
    assert slowest == [8.0, 6.0]


@pytest.mark.parametrize(
    ("num_layers", "num_ranks", "expected"),
    [(96, 8, [1, 2, 3, 4, 6, 12]), (126, 16, [1, 2, 4, 7]), (7, 7, [1]), (9, 2, [1, 2, 4])],
)
def test_numbers_of_chunks(num_layers, num_ranks, expected):
    assert chunk_numbers(num_layers, num_ranks) == expected
