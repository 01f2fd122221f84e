"""The memory of caches is there where sequences are, and goes with them."""

from __future__ import annotations

import mmap

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference.model.cache_memory import WholeZeros, new_cache_memory
from megatron.early_exit.inference.model.lazy_zeros import LazyZeros
from megatron.early_exit.inference.model.mapped_zeros import MappedZeros
from tests.helpers.pretended_gpu_memory import pretended_gpu_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PIECE = mmap.PAGESIZE


def test_each_device_has_its_own():
    assert isinstance(new_cache_memory((1, 2, 3), torch.float32, CPU, None), LazyZeros)
    assert isinstance(new_cache_memory((0, 2, 3), torch.float32, CPU, None), WholeZeros)
    with pretended_gpu_memory():
        memory = new_cache_memory((1, 2, 3), torch.float32, GPU, PIECE)
        assert isinstance(memory, MappedZeros)
        assert isinstance(new_cache_memory((0, 2, 3), torch.float32, CPU, PIECE), WholeZeros)
        del memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_any_shape(dtype):
    zeros = LazyZeros((3, 5, 7), dtype).data
    assert (zeros.shape, zeros.dtype) == ((3, 5, 7), dtype)
    assert not zeros.any()
    zeros[1] = 2
    assert zeros.sum() == 70


def test_memory_of_a_cpu_follows_what_is_written():
    process, places = psutil.Process(), 2**16
    size = 4 * places * 256
    before = process.memory_info().rss
    memory = LazyZeros((1, 4, places, 64), torch.float32)
    memory.data[0, 1, :100] = 1.0
    assert process.memory_info().rss - before < size / 16
    memory.data[0, 2] = 1.0
    assert process.memory_info().rss - before > size / 5
    memory.release(2)
    assert process.memory_info().rss - before < size / 16
    # What the next sequence needs at once stays.
    assert memory.data[0, 2, :256].all()
    assert not memory.data[0, 2, 300:].any()
    assert memory.data[0, 1, :100].all()


def test_neighbours_of_what_is_given_back_stay():
    memory = LazyZeros((2, 3, 10_001), torch.float32)
    memory.data.fill_(1.0)
    memory.release(1)
    assert memory.data[:, [0, 2]].all()
    assert memory.data[:, 1, :256].all()
    assert memory.data[:, 1].sum(dim=1).max() < 3000
    short = LazyZeros((1, 2, 100), torch.float32)
    short.data.fill_(1.0)
    short.release(0)
    assert short.data.all()
    short.clear(0, 40)
    assert short.data.sum(dim=2).tolist() == [[60, 100]]


ROWS = (range(2), range(2, 3))
"""The rows of two segments, whose memory is always committed together."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["commit", "release", "clear"]),
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(1, 100),
    ),
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, inner=st.sampled_from([64, 100, 192, 1024, 1500]))
def test_memory_of_a_gpu_holds_what_is_in_it(steps, inner):
    with pretended_gpu_memory() as driver:
        check_steps(driver, steps, inner)
    assert (driver.taken, driver.reserved) == (0, 0)


def check_steps(driver, steps, inner):
    """Commit and release as sequences do, and compare with a tensor that is simply there."""
    memory = MappedZeros((3, 3, 101, inner), torch.float32, GPU, PIECE)
    expected = torch.zeros(3, 3, 101, inner)
    ends: dict[tuple[int, int], int] = {}
    assert memory.data.shape[2] >= 101
    # Kernels find a slot by counting places.
    assert memory.data.is_contiguous()
    for number, (action, segment, slot, end) in enumerate(steps, start=1):
        driver.queue()
        if action == "commit":
            memory.commit(ROWS[segment], slot, end)
            for row in ROWS[segment]:
                for one in (memory.data, expected):
                    one[row, slot, :end] = number
            ends[segment, slot] = max(end, ends.get((segment, slot), 0))
        else:
            if action == "release":
                memory.release(slot)
            else:
                memory.clear(slot, end)
            expected[:, slot] = 0
            ends = {key: value for key, value in ends.items() if key[1] != slot}
        assert torch.equal(memory.data[:, :, :101], expected)
        pieces = sum(
            len(ROWS[segment]) * -(-end * inner * 4 // PIECE) for (segment, _), end in ends.items()
        )
        assert driver.taken == (1 + pieces) * PIECE
    assert driver.zeros_are_zero()


def test_what_could_not_be_had_is_asked_for_again():
    with pretended_gpu_memory() as driver:
        memory = MappedZeros((3, 1, 8, 1024), torch.float32, GPU, PIECE)
        driver.limit = 3 * PIECE
        with pytest.raises(torch.OutOfMemoryError):
            memory.commit(range(3), 0, 1)
        driver.limit = 2**30
        memory.commit(range(3), 0, 1)
        memory.data[:, 0, 0] = 1
        assert memory.data.sum() == 3 * 1024
        del memory
