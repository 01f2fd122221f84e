"""Attention of single positions to what a cache has of their sequences, as one operator.

Compilers and graphs take the operator for one step, whatever happens inside. Lengths are numbers on
the device, so what is captured once serves texts of all lengths. Rows may be of different
sequences, and several of them of one.

On a GPU the operator runs one of PyTorch's kernels for sequences of different lengths, where the
keys are: to the kernel each row is a sequence of its own, which is given by the place in the whole
cache at which it begins, and by its length.

Shapes: r rows; np query heads, ng key-value heads, hn head size; m places of a slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class RowPlaces(NamedTuple):
    """Where rows are in the caches, see `Places`.

    Attributes:
        slots: [r], of each row.
        positions: [r], of each row in its slot.
        starts: [r + 1] in int32, the places before the slot of each row; the last one is of no
            meaning.
        lengths: [r] in int32, the positions that each row attends to.
        firsts: [r + 1] in int32, 0, 1, 2, ...
    """

    slots: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    firsts: Tensor

    def open_sizes(self, has_fixed_rows: bool) -> list[Tensor]:
        """All of them, [r] and [r + 1], or none where the number of rows is fixed; see `Places`."""
        return [] if has_fixed_rows else list(self)

    def attend(self, cache: Tensor, queries: Tensor, new: Tensor, scale: float) -> Tensor:
        """Attend by the operator: a cache [slots, m, 2 ng, hn], queries [r, np, hn] and new keys
        and values [r, 2 ng, hn] -> [r, np, hn]; see `Places`."""
        return attend_rows(cache, queries, new, *self, scale)


def row_places(slots: Tensor, positions: Tensor, num_places: int) -> RowPlaces:
    """Where rows are in caches with `num_places` places in a slot, m: their slots [r], and their
    positions in these [r]."""
    starts = functional.pad((slots * num_places).to(torch.int32), (0, 1))
    lengths = (positions + 1).to(torch.int32)
    firsts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    return RowPlaces(slots, positions, starts, lengths, firsts)


@torch.library.custom_op("early_exit::attend_rows", mutates_args=("cache",))
def attend_rows(
    cache: Tensor,
    queries: Tensor,
    new: Tensor,
    slots: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    firsts: Tensor,
    scale: float,
) -> Tensor:
    """Put keys and values into a cache, and attend to it: all rows see what the others have put.

    Args:
        cache: [slots, m, 2 ng, hn], keys before values.
        queries: [r, np, hn]
        new: [r, 2 ng, hn]
        slots: see `RowPlaces`, as those that follow.
        scale: of the scores.

    Returns:
        [r, np, hn]
    """
    cache.index_put_((slots, positions), new)
    places = RowPlaces(slots, positions, starts, lengths, firsts)
    # What compilers have been told, whatever the kernels do.
    return _kernel_for(cache)(cache, queries, places, scale).contiguous()


@attend_rows.register_fake
def _(cache: Tensor, queries: Tensor, *_: Tensor | float) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


_Kernel = Callable[[Tensor, Tensor, RowPlaces, float], Tensor]
"""Cache, queries, places and scale to what the rows attend to, [r, np, hn]."""


def _kernel_for(cache: Tensor) -> _Kernel:
    if not cache.is_cuda:
        return plain
    size, width = cache.shape[-1], cache.dtype.itemsize
    is_new = torch.cuda.get_device_capability(cache.device) >= (8, 0)
    if width == 2 and size % 8 == 0 and size <= 256 and is_new:
        return flash
    # The kernel reads 16 bytes at a time.
    return efficient if size * width % 16 == 0 else plain


def flash(cache: Tensor, queries: Tensor, places: RowPlaces, scale: float) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691), for 16-bit numbers. With fewer key-value heads than
    query heads it divides the keys of a row over the processors.

    Args:
        cache: [slots, m, 2 ng, hn]
        queries: [r, np, hn]
        places: of the rows.
        scale: of the scores.

    Returns:
        [r, np, hn]
    """
    keys, values = _keys_and_values(cache)
    attended, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        places.firsts,
        places.starts,
        1,
        cache.shape[1],
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=places.lengths,
    )
    return attended


def efficient(cache: Tensor, queries: Tensor, places: RowPlaces, scale: float) -> Tensor:
    """The kernel of xFormers, for all formats. It knows no groups of query heads: those of a group
    stand in for positions, of which each sees the same keys. Shapes are those of `flash`: a cache
    [slots, m, 2 ng, hn] and queries [r, np, hn] -> [r, np, hn]."""
    keys, values = _keys_and_values(cache)
    groups = keys.shape[1]
    rows, heads, size = queries.shape
    per_group = heads // groups
    by_position = queries.view(rows, groups, per_group, size).transpose(1, 2).flatten(0, 1)
    attended, *_ = torch.ops.aten._efficient_attention_forward(
        by_position[None],
        keys[None],
        values[None],
        None,
        places.firsts * per_group,
        places.starts,
        per_group,
        cache.shape[1],
        0.0,
        0,
        scale=scale,
        seqlen_k=places.lengths,
    )
    by_row = attended.view(rows, per_group, groups, size).transpose(1, 2)
    return by_row.reshape(rows, heads, size)


def plain(cache: Tensor, queries: Tensor, places: RowPlaces, scale: float) -> Tensor:
    """The same, written for clarity, over all places of the rows' slots: a cache
    [slots, m, 2 ng, hn] and queries [r, np, hn] -> [r, np, hn]."""
    keys, values = cache[places.slots].transpose(1, 2).chunk(2, dim=1)
    seen = torch.arange(cache.shape[1], device=cache.device) < places.lengths[:, None]
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    attended = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=seen[:, None, None], scale=scale
    )
    return attended.reshape(queries.shape)


def _keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all slots one after another, [slots m, ng, hn], where they are."""
    keys, values = cache.view(-1, *cache.shape[2:]).chunk(2, dim=1)
    return keys, values
