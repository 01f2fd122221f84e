"""The memory in which the attentions of a pass turn their rows."""

import torch
from torch import Tensor

from megatron.early_exit.inference.model.kv_cache import KVCache


class Workspace:
    """Where attentions turn the queries, keys and values of r rows, one after the other.

    Views are made once instead of in every layer.

    Args:
        count: rows, r.
        num_heads: query heads.
        cache: of the keys and values.
        turns: there are rotary embeddings.

    Attributes:
        space: [r, (np + 2 ng) hn], what is projected goes here.
        turned: [r, np + ng, hn / 2], queries and keys in there as complex numbers.
        unconverted: [r, np + 2 ng, hn], the same space.
        converted: the same in the dtype of the cache, where it has another one.
        queries: [r, ng, np / ng, hn]
        new: [r, 2 ng, hn], the keys and values.
    """

    def __init__(self, count: int, num_heads: int, cache: KVCache, turns: bool) -> None:
        groups, data = cache.num_groups, cache.data
        self.count = count
        heads, size = num_heads + 2 * groups, data.shape[-1]
        # Turned in fp32, whatever the dtype: there are no complex numbers in others.
        dtype = torch.float32 if turns else data.dtype
        self.space = torch.empty(count, heads * size, dtype=dtype, device=data.device)
        self.unconverted = rows = self.space.view(count, heads, size)
        self.turned: Tensor | None = None
        if turns:
            pairs = rows.narrow(1, 0, num_heads + groups).unflatten(2, (-1, 2))
            self.turned = torch.view_as_complex(pairs)
        self.converted: Tensor | None = None
        if dtype != data.dtype:
            self.converted = rows = torch.empty_like(rows, dtype=data.dtype)
        self.new = rows.narrow(1, num_heads, 2 * groups)
        self.queries = rows.narrow(1, 0, num_heads).unflatten(1, (groups, -1))
