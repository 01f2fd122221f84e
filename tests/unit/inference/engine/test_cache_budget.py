"""The memory of the caches is divided such that it is never more than there is."""

from argparse import ArgumentTypeError

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.engine import cache_budget
from megatron.early_exit.inference.engine.cache_budget import plan_caches
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.engine_flags import memory_size
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.sequence import Sequence
from tests.helpers.large_shapes import LARGE
from tests.helpers.tiny_models import HEADS, make_model

LENGTH = 64
GIB = 2**30
GPU, TOTAL = torch.device("cuda", 0), 80 * 10**9
"""A GPU that nobody has, and its memory."""


class OnGpu:
    """A model that says it is on a GPU."""

    def __init__(self, model):
        self._model = model
        self.device = torch.device("cuda", 1)

    def __getattr__(self, name):
        return getattr(self._model, name)


def planned(model, slots=16, length=LENGTH, memory=None, share=None, agree=lambda number: number):
    return plan_caches(model, slots, length, memory, share, agree)


@pytest.mark.parametrize("heads", HEADS)
def test_pages_take_what_slots_hold(heads):
    model = make_model(exits=(1, 3), **HEADS[heads]).segmented
    runner = SegmentRunner(model, 1, LENGTH)
    tensors = [runner._cache.data[:, :, :LENGTH], runner._kept]
    tensors += [cache.data[:, :, :LENGTH] for cache in runner._caches[1:]]
    whole = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert sum(page_bytes(model)) * LENGTH // 16 == whole


def test_a_machine_keeps_half_of_its_memory(monkeypatch):
    model = make_model().segmented
    slot = sum(page_bytes(model)) * LENGTH // 16
    for left, expected in [(100, 32 * slot), (20, 10 * slot), (1, slot)]:
        monkeypatch.setattr(cache_budget, "available_memory", lambda left=left: left * slot)
        found = planned(model)
        assert (found.num_slots, found.bytes, found.reserved) == (16, expected, 0)
    assert planned(model, memory=3 * slot).bytes == 3 * slot
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(cache_budget, "available_memory", lambda: 40 * slot)
    assert planned(model).bytes == 5 * slot


def test_slots_of_a_gpu_are_as_many_as_fit(monkeypatch):
    model = OnGpu(make_model().segmented)
    slot = sum(page_bytes(model)) * LENGTH // 16

    def left(slots: int) -> None:
        free = GIB + slots * slot
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 10 * free))

    left(1000)
    assert planned(model, share=1.0).num_slots == 16
    left(10)
    found = planned(model, share=1.0)
    assert (found.num_slots, found.reserved) == (8, 8 * slot)
    assert found.bytes + found.reserved == 10 * slot
    left(1)
    assert planned(model, share=1.0).num_slots == 1
    left(0)
    with pytest.raises(ValueError, match=r"^max_sequence_length 64 is not possible: .* up to 0$"):
        planned(model, share=1.0)
    left(10)
    with pytest.raises(ValueError, match="max_sequence_length"):
        planned(model, share=0.5)
    assert planned(model, memory=4 * slot).reserved == 3 * slot
    with pytest.raises(ValueError, match=f"^kv_cache_memory .* up to {10 * slot} bytes"):
        planned(model, memory=10 * slot + 1)
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization 0.9 has no effect beside kv_"):
        planned(model, memory=4 * slot, share=0.9)


def test_processes_agree():
    model = make_model().segmented
    slot = sum(page_bytes(model)) * LENGTH // 16
    told = []

    def agree(number: int) -> int:
        told.append(number)
        return number // 2 if number > 0 else number

    assert planned(model, memory=8 * slot, agree=agree).bytes == 4 * slot
    assert told == [8 * slot, -slot]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memory": 0}, "kv_cache_memory 0 is out of range, allowed: 1 or more"),
        ({"kv_cache_memory": 1.5}, "kv_cache_memory 1.5 is not an integer, allowed: 1 or more"),
        (
            {"kv_cache_memory": 1000},
            "kv_cache_memory 1000 is out of range, allowed: 32768 bytes or more, which one "
            "sequence of 64 tokens takes",
        ),
        (
            {"gpu_memory_utilization": 0.0},
            "gpu_memory_utilization 0.0 is out of range, allowed: above 0, up to 1",
        ),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization 0.5 has no effect on a CPU"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EarlyExitEngine(make_model().segmented, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * GIB), ("500 MB", 500_000_000), ("1.5k", 1500), ("1000000", 10**6), ("1B", 1)],
)
def test_sizes_as_people_write_them(text, expected):
    assert memory_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "8 gigabytes", "-1GB", "0", "1e400", "nan", "8XiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ArgumentTypeError, match="is not a size, allowed: 1 byte or more"):
        memory_size(text)


def large_model(name, heads, monkeypatch):
    """A large model on the GPU, as tensors that have sizes but no memory, and the bytes that it
    leaves there."""
    exits = EarlyExitConfig(exit_layer_nums=(8, 16), **HEADS[heads])
    weights = {
        name: torch.empty(size, dtype=torch.bfloat16, device=GPU)
        for name, size in weight_shapes(LARGE[name], exits).items()
    }
    free = TOTAL - _bytes(weights.values())
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, TOTAL))
    return SegmentedModel(LARGE[name], exits, weights), free


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("heads", ["norm", "block"])
def test_large_models_fit_at_defaults(name, heads, monkeypatch):
    """On a GPU of 80 GB, by tensors that have sizes but no memory."""
    shape = LARGE[name]
    with FakeTensorMode():
        model, free = large_model(name, heads, monkeypatch)
        found = planned(model, length=shape.max_position_embeddings)
        runner = SegmentRunner(model, found.num_slots, shape.max_position_embeddings)
        caches = _bytes([runner._kept, *(cache.data for cache in runner._caches)])
    assert all(one.device == GPU for one in (runner._kept, runner._cache.data))
    assert 0.5 * (found.bytes + found.reserved) < caches
    # Slots have one place more than positions.
    assert caches < 1.001 * found.reserved
    assert free - caches - found.bytes > 0.05 * TOTAL


@pytest.mark.parametrize("name", LARGE)
def test_slots_of_a_gpu_that_fill_piece_by_piece(name, monkeypatch):
    """There are as many as are asked for, however long texts may be."""
    shape = LARGE[name]
    with FakeTensorMode():
        model, free = large_model(name, "block", monkeypatch)
    monkeypatch.setattr(cache_budget, "smallest_piece", lambda device: 2**21)
    length = shape.max_position_embeddings
    found = planned(model, length=length)
    assert (found.num_slots, found.reserved) == (16, 0)
    assert found.bytes == int(0.9 * TOTAL) - (TOTAL - free) - 2**30
    pieces = found.pieces
    assert pieces.size == 2**21
    # A piece of an attention holds so many positions, and hidden states take their own.
    position = 2 * shape.num_query_groups * shape.kv_channels * 2
    assert pieces.num_positions == 2**21 // position
    hidden = -(-pieces.num_positions * 2 * shape.hidden_size // 2**21)
    expected = [8 + 1 + hidden, 8 + 1 + hidden, shape.num_layers - 16]
    at_once = pieces.pages_at_once
    assert [one * at_once / 2**21 for one in pieces.page_bytes] == expected
    pages = found.pages(True)
    num_texts = 0
    while pages.admit(Sequence(num_texts, [num_texts] * 500, group=num_texts)):
        num_texts += 1
    # Before, two to four slots were reserved for the longest texts.
    assert num_texts >= 100
    # The driver is not told of millions of pieces.
    many = planned(model, slots=1024, length=length).pieces
    whole = 1024 * length * sum(found.page_bytes) // 16
    assert whole // many.size <= 2**18 < whole // (many.size // 2)


def test_short_slots_are_taken_whole(monkeypatch):
    model = OnGpu(make_model().segmented)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**33, 2**33))
    # 128 bytes of keys and values for a position: 32 positions in the smallest piece.
    for piece, is_whole in [(None, True), (0, True), (4096, False), (8192, True)]:
        monkeypatch.setattr(cache_budget, "smallest_piece", lambda device, piece=piece: piece)
        assert (planned(model).pieces is None) == is_whole
    # One process that has to take them whole decides for all of them.
    monkeypatch.setattr(cache_budget, "smallest_piece", lambda device: 4096)
    assert planned(model).pieces is not None
    assert planned(model, agree=lambda number: 0 if number == 4096 else number).pieces is None


def _bytes(tensors):
    return sum(one.numel() * one.itemsize for one in tensors)
