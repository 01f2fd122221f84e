"""Attention of single positions: against a loop over rows, with stand-ins for the GPU's kernels."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megatron.early_exit.inference.model import rows_attention
from megatron.early_exit.inference.model.rows_attention import (
    attend_rows,
    efficient,
    flash,
    plain,
    row_places,
)

CUDA = torch.device("cuda", 0)
"""Not its name: a process that has been prepared for training takes that for the CPU."""
SCALE = 0.3
PLACES = 12
HEADS = [(4, 4), (6, 2), (4, 1)]
"""Query heads and key-value heads."""
ROWS = [
    ([2], [0]),
    ([3, 0, 1], [5, 11, 0]),
    # Several positions of a sequence see one another; the last row stands in for missing ones.
    ([1, 1, 1, 0, 1], [4, 5, 6, 9, 4]),
]
"""The slots of some rows, and their positions."""


def expected(cache, queries, slots, positions):
    """One row, one head after the other."""
    rows, heads, _ = queries.shape
    groups = cache.shape[2] // 2
    result = torch.empty_like(queries)
    for row in range(rows):
        seen = cache[slots[row], : positions[row] + 1]
        for head in range(heads):
            group = head // (heads // groups)
            scores = seen[:, group] @ queries[row, head] * SCALE
            result[row, head] = torch.softmax(scores, 0) @ seen[:, groups + group]
    return result


def inputs(num_heads, num_groups, slots, positions, size=8):
    generator = torch.Generator().manual_seed(len(slots))
    cache = torch.randn(4, PLACES, 2 * num_groups, size, generator=generator)
    queries = torch.randn(len(slots), num_heads, size, generator=generator)
    new = torch.randn(len(slots), 2 * num_groups, size, generator=generator)
    if len(slots) == 5:
        queries[-1], new[-1] = queries[0], new[0]
    return cache, queries, new


def flash_stand_in(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, *rest, **kwargs):
    """What FlashAttention does with texts of different lengths: each begins where `cum_seq_k` says,
    and has as many keys as `seqused_k` says."""
    dropout, causal, _ = rest
    assert (dropout, causal, max_q) == (0.0, False, 1)
    assert cum_seq_q.dtype == cum_seq_k.dtype == kwargs["seqused_k"].dtype == torch.int32
    assert len(cum_seq_q) == len(cum_seq_k) == len(kwargs["seqused_k"]) + 1
    result = torch.empty_like(query)
    for one, length in enumerate(kwargs["seqused_k"].tolist()):
        assert length <= max_k
        own = slice(int(cum_seq_q[one]), int(cum_seq_q[one + 1]))
        assert own.stop - own.start <= max_q
        seen = slice(int(cum_seq_k[one]), int(cum_seq_k[one]) + length)
        per_group = query.shape[1] // key.shape[1]
        keys = key[seen].repeat_interleave(per_group, dim=1)
        values = value[seen].repeat_interleave(per_group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[own], keys) * kwargs["scale"]
        result[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    none = query.new_empty(0)
    return result, none, none, none, none


def efficient_stand_in(query, key, value, bias, starts_q, starts_k, max_q, max_k, *rest, **kwargs):
    """What the kernel of xFormers does: as many heads of keys as of queries, in one batch."""
    dropout, mask_type = rest[:2]
    assert bias is None
    assert (dropout, mask_type) == (0.0, 0)
    assert query.shape[0] == key.shape[0] == 1
    assert query.shape[2] == key.shape[2]
    assert starts_q.dtype == starts_k.dtype == kwargs["seqlen_k"].dtype == torch.int32
    result = torch.empty_like(query)
    for one, length in enumerate(kwargs["seqlen_k"].tolist()):
        assert length <= max_k
        own = slice(int(starts_q[one]), int(starts_q[one + 1]))
        assert own.stop - own.start <= max_q
        seen = slice(int(starts_k[one]), int(starts_k[one]) + length)
        scores = torch.einsum("qhd,khd->hqk", query[0, own], key[0, seen]) * kwargs["scale"]
        result[0, own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[0, seen])
    none = query.new_empty(0)
    return result, none, none, none, max_q, max_k


@pytest.fixture
def stand_ins():
    """The kernels of the GPU on a CPU, for which PyTorch has none of these names."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_stand_in, "CPU")
        library.impl("_efficient_attention_forward", efficient_stand_in, "CPU")
        yield


@pytest.mark.parametrize(("num_heads", "num_groups"), HEADS)
@pytest.mark.parametrize(("slots", "positions"), ROWS)
@pytest.mark.parametrize("kernel", [plain, flash, efficient])
def test_as_row_by_row(num_heads, num_groups, slots, positions, kernel, stand_ins, monkeypatch):
    cache, queries, new = inputs(num_heads, num_groups, slots, positions)
    before = cache.clone()
    monkeypatch.setattr(rows_attention, "_kernel_for", lambda cache: kernel)
    places = row_places(torch.tensor(slots), torch.tensor(positions), PLACES)
    found = attend_rows(cache, queries, new, *places, SCALE)
    for row, place in enumerate(zip(slots, positions, strict=True)):
        before[place] = new[row]
    assert torch.equal(cache, before)
    torch.testing.assert_close(found, expected(before, queries, slots, positions))


@pytest.mark.parametrize(("num_heads", "num_groups"), HEADS)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(flash, torch.bfloat16), (efficient, torch.float32), (plain, torch.float32)],
)
def test_the_gpu_takes_these_arguments(num_heads, num_groups, kernel, dtype):
    """PyTorch knows the shapes of its kernels' results without running them."""
    with FakeTensorMode():
        cache = torch.empty(4, PLACES, 2 * num_groups, 64, dtype=dtype, device=CUDA)
        queries = torch.empty(3, num_heads, 64, dtype=dtype, device=CUDA)
        index = torch.empty(3, dtype=torch.int64, device=CUDA)
        found = kernel(cache, queries, row_places(index, index, PLACES), SCALE)
        assert found.shape == queries.shape
        assert found.dtype == dtype
        assert found.device.type == "cuda"


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "kernel"),
    [
        (torch.bfloat16, 128, (9, 0), flash),
        (torch.float16, 64, (8, 0), flash),
        (torch.bfloat16, 128, (7, 5), efficient),
        (torch.bfloat16, 512, (9, 0), efficient),
        (torch.float32, 64, (9, 0), efficient),
        (torch.float32, 6, (9, 0), plain),
        (torch.bfloat16, 20, (9, 0), plain),
    ],
)
def test_the_kernel_for_a_cache(dtype, size, capability, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        cache = torch.empty(1, 1, 2, size, dtype=dtype, device=CUDA)
        assert rows_attention._kernel_for(cache) is kernel
    assert rows_attention._kernel_for(torch.empty(1, 1, 2, size, dtype=dtype)) is plain


def test_as_an_operator():
    """What a compiler may assume of it holds."""
    cache, queries, new = inputs(6, 2, *ROWS[1])
    slots, positions = map(torch.tensor, ROWS[1])
    places = row_places(slots, positions, PLACES)
    arguments = (cache, queries, new, *places, SCALE)
    torch.library.opcheck(attend_rows, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 4095])
@pytest.mark.parametrize(("num_heads", "num_groups"), [*HEADS, (32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_of_a_gpu(count, length, num_heads, num_groups, dtype):
    generator = torch.Generator("cuda").manual_seed(length)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    cache = torch.randn(16, 4097, 2 * num_groups, 64, **options)
    queries = torch.randn(count, num_heads, 64, **options)
    slots = torch.randperm(16, device="cuda", generator=generator)[:count]
    positions = (length - 1 - torch.arange(count, device="cuda")).clamp(min=0)
    places = row_places(slots, positions, 4097)
    scale = 1 / math.sqrt(64)
    found = rows_attention._kernel_for(cache)(cache, queries, places, scale)
    whole = plain(cache.double(), queries.double(), places, scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), whole, atol=tolerance, rtol=tolerance)
