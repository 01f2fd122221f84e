"""Some rows of a batch, and a number for each row of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.transfer import upload


def column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[n, 1], a number of any unit for each row."""
    return upload([[value] for value in values], device, dtype)


def some_rows(values: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Some rows of [n, ...], ascending, and their index; all of them are the values themselves,
    without an index."""
    if len(rows) == len(values):
        return values, None
    index = upload(rows, values.device)
    return values.index_select(0, index), index


def replaced(values: Tensor, index: Tensor | None, part: Tensor) -> Tensor:
    """Values [n, ...] with other ones in the rows of an index; without one those are all rows."""
    return part if index is None else values.index_copy(0, index, part)


def fp32_factor(factor: float) -> float:
    """A positive factor for logits, within what fp32 can multiply and divide them by."""
    return min(max(factor, 1e-30), 1e30)
