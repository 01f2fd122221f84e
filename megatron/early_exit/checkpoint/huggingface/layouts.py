"""How tensors of other libraries are combined to one of ours, and extracted from it again.

Shapes: h hidden size, f MLP size, np and ng query heads and groups, hn head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A rearrangement that loses nothing.

    Attributes:
        rows: of each of the parts, for a whole with so many rows.
        join: parts to the whole.
        split: the whole to its parts.
    """

    rows: Callable[[Architecture, int], tuple[int, ...]]
    join: Callable[[Architecture, list[Tensor]], Tensor]
    split: Callable[[Architecture, Tensor], tuple[Tensor, ...]]

    def shapes(self, architecture: Architecture, whole: Shape) -> list[Shape]:
        """The shapes of the parts of a whole of this shape."""
        return [(rows, *whole[1:]) for rows in self.rows(architecture, whole[0])]


def _join_groups(a: Architecture, parts: list[Tensor]) -> Tensor:
    """Queries, keys and values, [np hn, ...] and twice [ng hn, ...], to group after group."""
    grouped = [part.unflatten(0, (a.num_query_groups, -1, a.kv_channels)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _split_groups(a: Architecture, whole: Tensor) -> tuple[Tensor, ...]:
    """The inverse of `_join_groups`, from [ng * (np / ng + 2) * hn, ...]."""
    per_group = a.num_attention_heads // a.num_query_groups
    grouped = whole.unflatten(0, (a.num_query_groups, per_group + 2, a.kv_channels))
    return tuple(part.flatten(0, 2) for part in grouped.split((per_group, 1, 1), dim=1))


def _group_rows(a: Architecture, rows: int) -> tuple[int, ...]:
    keys = a.num_query_groups * a.kv_channels
    return (a.num_attention_heads * a.kv_channels, keys, keys)


def _swap_columns(matrix: Tensor) -> Tensor:
    return torch.cat(matrix.chunk(2, dim=-1)[::-1], dim=-1)


IDENTITY = TensorLayout(
    rows=lambda a, rows: (rows,),
    join=lambda a, parts: parts[0],
    split=lambda a, whole: (whole,),
)

CONCAT_ROWS = TensorLayout(
    rows=lambda a, rows: (rows // 2, rows // 2),
    join=lambda a, parts: torch.cat(parts),
    split=lambda a, whole: tuple(whole.chunk(2)),
)
"""Two of equal size, [f, h] each, in [2 f, h]."""

SWAPPED_COLUMNS = TensorLayout(
    rows=lambda a, rows: (rows,),
    join=lambda a, parts: _swap_columns(parts[0]),
    split=lambda a, whole: (_swap_columns(whole),),
)
"""One of [..., 2 h] whose halves of columns are in the other order in ours."""

GROUP_BY_GROUP = TensorLayout(rows=_group_rows, join=_join_groups, split=_split_groups)
"""Queries, keys and values in one matrix: of each group its queries, its key, its value."""
