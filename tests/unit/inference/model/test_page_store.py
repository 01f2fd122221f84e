"""Pages come back into a slot as they were, with all that segments and blocks have seen of them."""

import pytest
import torch

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.page_store import PageStore
from megatron.early_exit.inference.model.runner import SegmentRunner
from tests.helpers.tiny_models import HEADS, make_model

SIZE = 4


def runner_of(heads: str) -> SegmentRunner:
    return SegmentRunner(make_model(exits=(1, 3), **HEADS[heads]).segmented, 3, 12)


def fill(runner: SegmentRunner, slot: int) -> list[torch.Tensor]:
    memory = runner.slot_memory(Span(slot, SIZE, 2 * SIZE))
    tensors = [*memory.segments, *memory.kept, *(b for b in memory.blocks if b is not None)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("heads", ["norm", "mlp", "block"])
def test_what_has_been_saved_is_loaded(heads):
    runner = runner_of(heads)
    store = PageStore(runner, SIZE)
    fill(runner, 1)
    for depth in (1, 2, 3):
        store.save(7, 1, 1, depth)
        runner.clear(2)
        store.load(7, 2, 1)
        memory = runner.slot_memory(Span(2, SIZE, 2 * SIZE))
        assert [bool(one.any()) for one in memory.segments] == [i < depth for i in range(3)]
        # Positions may wait behind the last segment that has seen them.
        assert [bool(one.any()) for one in memory.kept] == [i == depth - 1 for i in range(2)]
        for one, number in zip(memory.segments[:depth], (1, 2, 3), strict=False):
            assert (one == number).all()
    store.drop([7, 8])
    assert len(store) == 0


def test_blocks_go_on_behind_the_pages_that_they_have_seen():
    runner = runner_of("block")
    fill(runner, 0)
    runner.extend_block(0, Span(0, 0, 2 * SIZE))
    store = PageStore(runner, SIZE)
    for index in range(2):
        store.save(index, 0, index, 3, blocks=[0])
        store.load(index, 1, index)
    assert runner.block_lengths(1) == [2 * SIZE, 0]
    block = runner.slot_memory(Span(1, SIZE, 2 * SIZE)).blocks[0]
    assert block is not None
    assert (block == 6).all()
    # One that comes behind a gap is not seen.
    store.load(1, 2, 1)
    assert runner.block_lengths(2) == [0, 0]


def test_the_residual_stream_is_kept_where_blocks_have_yet_to_see_it():
    runner = runner_of("block")
    fill(runner, 0)
    store = PageStore(runner, SIZE, keeps_for_blocks=True)
    store.save(0, 0, 1, 3)
    store.load(0, 1, 1)
    kept = runner.slot_memory(Span(1, SIZE, 2 * SIZE)).kept
    assert [bool(one.any()) for one in kept] == [True, True]


def test_what_is_saved_does_not_change_with_the_slot():
    runner = runner_of("norm")
    expected = fill(runner, 0)
    store = PageStore(runner, SIZE)
    store.save(0, 0, 1, 3)
    runner.clear(0)
    store.load(0, 2, 1)
    memory = runner.slot_memory(Span(2, SIZE, 2 * SIZE))
    for found, one in zip(memory.segments, expected, strict=False):
        assert torch.equal(found, one)
