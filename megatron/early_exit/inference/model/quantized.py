"""Products with weight matrices in 8 bits.

A matrix is whole numbers from -127 to 127, with one scale for each output channel. What is exact
are products of such weights with numbers of 7 bits, see `exact_products.py`; where activations have
8, sums of two products may not fit between instructions. So each row of activations is split into
two rows of 7 bits, a coarse and a fine one, with a scale of its own: together 14 bits, whose error
is a hundredth of that of the weights. The weights are read once for both, and a row's result does
not depend on the rows beside it.

Shapes: r rows, k inputs, n output channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.quantization import SCALE_ENDING
from megatron.early_exit.inference.model.exact_products import (
    MOST_OF_ROWS,
    FastestLibrary,
    exact_libraries,
)
from megatron.early_exit.inference.model.packed import pack

TIED_PROJECTION = "embedding.projection.weight"
"""A copy of the word embedding, for the heads that are tied to it: the embedding itself keeps its
format."""

_FINER = 2 * MOST_OF_ROWS
"""Steps of the fine row in one of the coarse row: it has what rounding has left, up to half a
step."""
_LEAST = 1e-30
"""A row of zeros has a scale, too."""


def reason_against(device: torch.device) -> str | None:
    """Why there are no products in 8 bits on a device; None where there are."""
    if device.type != "cpu":
        return f"there are no such products here for the device {device}, only for x86 CPUs"
    if not exact_libraries():
        return (
            "this build of PyTorch has no library of such products for x86 CPUs, neither FBGEMM "
            "nor oneDNN"
        )
    return None


def pack_quantized(values: Tensor, scale: Tensor, fastest: FastestLibrary) -> Tensor:
    """A matrix of whole numbers [n, k] and scales [n] in the layout of the fastest library.

    Returns:
        [n, 1] in int8, what the compiler sees of it and takes for an argument like other weights.
        The matrix itself, which is an object of the library's, is its attribute `matrix`.
    """
    packed: Any = torch.zeros(len(scale), 1, dtype=torch.int8)
    packed.matrix = fastest.matrix(values, scale)
    return packed


def unpack_quantized(packed: Any) -> Tensor:
    """The matrix [n, k] in fp32 that one of `pack_quantized` stands for."""
    dense: Tensor = packed.matrix.dense()
    return dense


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight of any shape is in 8 bits: whole numbers [n, k], or what `pack_quantized`
    gives for them [n, 1]."""
    return weight.dtype == torch.int8


def packed_tensors(tensors: Mapping[str, Tensor], fastest: FastestLibrary) -> dict[str, Tensor]:
    """The tensors of a layer with its matrices packed for a few rows, each in its format.

    Args:
        tensors: by name, matrices [n, k], vectors, and the scales [n] of matrices in 8 bits.
        fastest: finds the library of products in 8 bits.

    Returns:
        The same by name: matrices [n, k] packed by `pack`, those in 8 bits as the [n, 1] of
        `pack_quantized`, without the scales that are part of these, and vectors as they were.
    """
    return {
        name: pack(tensor)
        if tensor.dim() == 2 and not is_quantized(tensor)
        else pack_quantized(tensor, tensors[f"{name}{SCALE_ENDING}"], fastest)
        if is_quantized(tensor)
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(f"weight{SCALE_ENDING}")
    }


def quantized_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [r, k] -> x weight^T + bias [r, n]"""
    numbers = x.float()
    step = numbers.abs().amax(dim=1, keepdim=True).clamp(min=_LEAST) / MOST_OF_ROWS
    exact = numbers / step
    coarse = exact.round()
    rows = torch.cat((coarse, (exact - coarse) * _FINER))
    products = torch.ops.early_exit.whole_number_product.default(rows, packed)
    count = x.shape[0]
    product = (products[:count] + products[count:] * (1 / _FINER)) * step
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype)


def _whole_number_product(x: Tensor, packed: Any) -> Tensor:
    """x [r, k], rounded to whole numbers from -64 to 63 -> x weight^T [r, n]"""
    product: Tensor = packed.matrix.multiply(x)
    return product


def _shape_of_product(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


# See the end of packed.py: what the compiler knows nothing about it calls.
_LIBRARY = torch.library.Library("early_exit", "FRAGMENT")
_LIBRARY.define("whole_number_product(Tensor x, Tensor packed) -> Tensor")
_LIBRARY.impl("whole_number_product", _whole_number_product, "CPU")
torch.library.register_fake("early_exit::whole_number_product", _shape_of_product)
