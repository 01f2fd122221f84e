"""Memory is taken when it is written to, and given back."""

import psutil
import pytest
import torch

from megatron.early_exit.inference.model.lazy_zeros import LazyZeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_any_shape(dtype):
    zeros = LazyZeros((3, 5, 7), dtype, CPU).data
    assert (zeros.shape, zeros.dtype) == ((3, 5, 7), dtype)
    assert not zeros.any()
    zeros[1] = 2
    assert zeros.sum() == 70
    assert LazyZeros((0, 5), dtype, CPU).data.shape == (0, 5)


def test_memory_follows_what_is_written():
    process, size = psutil.Process(), 2**26
    before = process.memory_info().rss
    memory = LazyZeros((4, size // 4), torch.float32, CPU)
    memory.data[1, :1000] = 1.0
    assert process.memory_info().rss - before < size / 16
    memory.data[2] = 1.0
    assert process.memory_info().rss - before > size / 2
    memory.release(memory.data[2])
    assert process.memory_info().rss - before < size / 16
    assert not memory.data[2].any()
    assert memory.data[1, :1000].all()


def test_neighbours_of_what_is_given_back_stay():
    memory = LazyZeros((100_000,), torch.float32, CPU)
    memory.data.fill_(1.0)
    memory.release(memory.data[1001:90_001])
    assert memory.data[:1001].all()
    assert memory.data[90_001:].all()
    assert memory.data.sum() < 15_000
    memory.release(memory.data[5:8])
    assert memory.data[5:8].all()
