"""What is measured of each part of a model is this part, and all of it: operations instead of
seconds are counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.planner.costs.model_shape import ModelShape  # noqa: E402
from megatron.early_exit.training import part_profile  # noqa: E402
from megatron.early_exit.training.part_profile import PartProfiler  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402

SHAPE = ModelShape.llama(
    num_layers=12,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=250,
    seq_length=8,
)
OPTIONS = {"transformer_impl": "local", "masked_softmax_fusion": False, "persist_layer_norm": False}
# The vocabulary is padded.
PROJECTION = 2 * 256 * SHAPE.hidden_size

# torch does not know the one that adds up weight gradients.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, one, other, **out: 2 * one[0] * one[1] * other[1]}


class OperationClock:
    """Counts the operations of matrix products, in the place of a `PassClock`."""

    def __init__(self) -> None:
        self.counted = {"forward": 0, "backward": 0}

    @contextmanager
    def time(self, kind: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            yield
        # Those of attention are counted by some versions of torch, on some devices.
        products = ("mm", "addmm", "addmm_", "bmm")
        for operation, flops in counter.get_flop_counts()["Global"].items():
            self.counted[kind] += flops * (str(operation).removeprefix("aten.") in products)

    def total_s(self) -> tuple[float, float]:
        return self.counted["forward"], self.counted["backward"]


def measure(monkeypatch, exits: EarlyExitConfig, sizes: list[int], dtype=torch.float32):
    monkeypatch.setattr(part_profile, "PassClock", OperationClock)
    profiler = PartProfiler(shape=SHAPE, exits=exits, dtype=dtype, options=OPTIONS)
    told = []
    with model_parallel():
        found = profiler.measure(sizes, 1, lambda *what: told.append(what))
    return found, told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_take_what_they_are_made_of(monkeypatch, dtype):
    found, told = measure(monkeypatch, EarlyExitConfig(), [1, 3], dtype)
    assert told == [(part, size) for part in ("layer", "embedding", "head") for size in (1, 3)]
    for size, parts in found.items():
        tokens = size * SHAPE.seq_length
        layer, head = 2 * SHAPE.layer_weights * tokens, PROJECTION * tokens
        assert parts == {
            "layer": {"forward": layer, "backward": 2 * layer},
            "embedding": {"forward": 0, "backward": 0},
            "head": {"forward": head, "backward": 2 * head},
        }


@pytest.mark.parametrize(
    ("heads", "operations"),
    [
        ({}, PROJECTION),
        ({"use_exit_norm": True, "untie_exit_output_weights": True}, PROJECTION),
        ({"exit_vocab_size": 64}, PROJECTION / 4),
        ({"use_exit_mlp": True}, PROJECTION + 2 * SHAPE.mlp_weights),
        ({"use_exit_block": True}, PROJECTION + 2 * SHAPE.layer_weights),
    ],
)
def test_exits_do_everything_in_the_backward(monkeypatch, heads, operations):
    exits = EarlyExitConfig(exit_layer_nums=(4, 9), exit_layer_weight=(0.1, 0.2), **heads)
    found, _ = measure(monkeypatch, exits, [2])
    tokens = 2 * SHAPE.seq_length
    assert found[2]["exit"] == {"forward": 0, "backward": 3 * operations * tokens}


def test_placed_exits_are_measured_behind_a_layer(monkeypatch):
    exits = EarlyExitConfig(exit_layer_nums=(5,), pre_exit=True)
    found, _ = measure(monkeypatch, exits, [1])
    assert found[1]["exit"]["backward"] == 3 * PROJECTION * SHAPE.seq_length
