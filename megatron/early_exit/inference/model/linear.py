"""Products with weight matrices, the bulk of all work."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from megatron.early_exit.inference.model.packed import pack, packed_product
from megatron.early_exit.inference.model.quantized import is_quantized, quantized_product

MOST_LOOP_ROWS = 2
"""Up to so many rows, such as those of a draft and the token in front of it, a loop over a plain
weight takes hardly longer than for one. Four take half as long again, and packed weights are then
the faster ones."""

Function = Callable[[Tensor], Tensor]
Addition = Callable[[Tensor, Tensor], Tensor]


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Function:
    """x [r, k] -> x weight^T + bias [r, n], for a weight [n, k].

    On a CPU the weight is packed, if it is not yet. Where a compiler is at work it is taken as it
    is: the products of a row or two with a plain weight are sums that become one loop. A weight in
    8 bits has been packed before, see `pack_quantized`.
    """
    if is_quantized(weight):
        return partial(quantized_product, packed=weight, bias=bias)
    if torch.compiler.is_compiling():
        return partial(_compiled_product, weight=weight, bias=bias)
    weight = weight if weight.is_mkldnn else pack(weight)
    product = packed_product if weight.is_mkldnn else functional.linear
    return lambda x: product(x, weight, bias)


def make_addition(weight: Tensor, bias: Tensor | None, reduce: Function | None) -> Addition:
    """x [r, n], y [r, k] -> x + y weight^T + bias, for a weight [n, k].

    `reduce` adds up the products of ranks that share it; it is None where the product is whole.
    """
    if torch.compiler.is_compiling():
        if reduce is None:
            return lambda x, y: x + _compiled_product(y, weight, bias)
        if bias is None:
            return lambda x, y: x + reduce(_compiled_product(y, weight, None))
        return lambda x, y: x + reduce(_compiled_product(y, weight, None)) + bias
    if not (weight.is_mkldnn or is_quantized(weight)):
        weight = pack(weight)
    if reduce is None and not (weight.is_mkldnn or is_quantized(weight)):
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
    if is_quantized(weight):
        return quantized_product(x, weight, bias)
    if weight.is_mkldnn:
        return torch.ops.early_exit.packed_product.default(x, weight, bias)
    # Asked like this, a number of rows that is left open stays so.
    if not statically_known_true(x.shape[0] <= MOST_LOOP_ROWS):
        return functional.linear(x, weight, bias)
    rows, numbers = x.float().contiguous(), weight.float()
    if x.device.type == "cpu":
        # What is given strides is computed before the loop over the weights: else the compiler
        # computes each entry of a row again for each output. On a GPU that is a kernel saved.
        rows = rows.as_strided(rows.shape, rows.stride())
    product = torch.stack([(numbers * row).sum(dim=-1) for row in rows])
    if bias is not None:
        product += bias.float()
    return product.to(x.dtype)
