"""Products with weight matrices, the bulk of all work."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[[Tensor], Tensor]
Addition = Callable[[Tensor, Tensor], Tensor]

_TYPICAL_ROWS = 8
_FEW_ROWS = 16
"""Up to here each number of rows is multiplied as it is."""
_SIZES_OF_AN_OCTAVE = 8
"""Numbers of rows beyond, from each power of two to the next."""


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Function:
    """x [r, k] -> x weight^T + bias [r, n], for a weight [n, k].

    On a CPU the weight is copied into the blocked layout that oneDNN prefers for a few rows, as
    torch's own compiler does when it freezes a model. One row is multiplied as fast as the memory
    gives the weights; eight take little more than the time of one, where plain products take
    several times as long: that is what makes batches, and a catch-up of pending positions, cheap.
    oneDNN makes code for each number of rows, and keeps it: many rows are rounded up, so that the
    code for a few sizes serves all, at all times.
    Where a compiler is at work, the product of a single row is a sum that it makes one loop of.
    """
    if torch.compiler.is_compiling():
        return partial(_compiled_product, weight=weight, bias=bias)
    if weight.device.type == "cpu" and _packs(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise.default

        def product(x: Tensor) -> Tensor:
            rows = x.shape[0]
            if missing := rounded_up(rows) - rows:
                x = functional.pad(x, (0, 0, 0, missing))
                return multiply(x, packed, bias, "none", [], "")[:rows]
            return multiply(x, packed, bias, "none", [], "")

        return product
    return partial(functional.linear, weight=weight, bias=bias)


def rounded_up(rows: int) -> int:
    """The number of rows that are multiplied in the place of so many, at most an eighth more."""
    if rows <= _FEW_ROWS:
        return rows
    step = (1 << (rows - 1).bit_length()) // (2 * _SIZES_OF_AN_OCTAVE)
    return -(-rows // step) * step


def make_addition(weight: Tensor, bias: Tensor | None, reduce: Function | None) -> Addition:
    """x [r, n], y [r, k] -> x + y weight^T + bias, for a weight [n, k].

    Args:
        weight, bias: of the product.
        reduce: adds up the products of ranks that share it; None where it is whole.
    """
    if torch.compiler.is_compiling():
        return lambda x, y: x + _compiled_product(y, weight, bias)
    if reduce is None and not (weight.device.type == "cpu" and _packs(weight.dtype)):
        transposed = weight.t()
        if bias is None:
            return lambda x, y: torch.addmm(x, y, transposed)
        return lambda x, y: torch.addmm(x, y, transposed).add_(bias)
    if reduce is None:
        whole = make_linear(weight, bias)
        return lambda x, y: whole(y).add_(x)
    part = make_linear(weight)
    if bias is None:
        return lambda x, y: reduce(part(y)).add_(x)
    return lambda x, y: reduce(part(y)).add_(x).add_(bias)


def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [r, k] -> [r, n]"""
    if x.shape[0] > 1:
        return functional.linear(x, weight, bias)
    product = (weight.float() * x.float()).sum(dim=-1)
    if bias is not None:
        product += bias.float()
    return product.to(x.dtype).unsqueeze(0)


def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU have the blocked products."""
    operations = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(operations._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(operations._is_mkldnn_fp16_supported())
    return dtype == torch.float32
