"""Libraries that multiply by matrices in 8 bits exactly, and which of them is the fastest here.

PyTorch brings two for x86 CPUs, FBGEMM and oneDNN. What is exact everywhere are products with
numbers of 7 bits: where there are no instructions for sums of four products, those of two are added
up in 16 bits. Both libraries then give the same bits, so a model may use one for some of its
matrices and another one for others. Which one is faster depends on the processor and on the shape:
both are tried, with a matrix of that shape, before one is chosen.

Shapes: r rows, k inputs, n output channels.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

MOST_OF_ROWS = 63
"""The largest whole number in a row by size."""
_ZERO = 64
"""What stands for zero among the numbers from 0 to 127, which the libraries take."""
_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"
"""FBGEMM's operator that rounds its input by a given scale and gives fp32."""
_MOST_TRIED = 2**19
"""Entries of the matrix that is tried: a greater one has fewer output channels."""
_FEW, _MANY = 2, 16
"""Rows of one and of eight rows of activations, each of which is split into two."""
_REPEATS = 5
_CLEARLY_FASTER = 0.9
"""Part of the time of the first library at which another one is preferred to it."""
_LOG = logging.getLogger(__name__)


class ExactMatrix(Protocol):
    """A matrix in the layout of a library, made of whole numbers [n, k] in int8 and scales [n]."""

    def __init__(self, values: Tensor, scale: Tensor) -> None: ...

    def multiply(self, rows: Tensor) -> Tensor:
        """Whole numbers from -63 to 63, or close to them, [r, k] in fp32 -> their products with the
        matrix [r, n]."""

    def dense(self) -> Tensor:
        """The matrix [n, k] in fp32."""


class FbgemmMatrix:
    """A matrix of whole numbers [n, k] and scales [n], see `ExactMatrix`."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # PyTorch is about to give up tensors of this kind; `exact_libraries` will notice.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            whole = torch._make_per_channel_quantized_tensor(
                values.contiguous(), scale.double(), zeros, axis=0
            )
        self._packed = torch.ops.quantized.linear_prepack(whole, None)
        # What `default` itself calls, after it has looked through all arguments for such as must be
        # traced, which takes a fifth of the time of a small product.
        self._product: Callable[..., Tensor] = getattr(torch.ops.quantized, _PRODUCT).default._op

    def multiply(self, rows: Tensor) -> Tensor:
        """Rows [r, k] -> their products with the matrix [r, n], see `ExactMatrix`."""
        return self._product(rows, 1.0, _ZERO, self._packed)

    def dense(self) -> Tensor:
        """The matrix [n, k] in fp32, see `ExactMatrix`."""
        whole, _ = torch.ops.quantized.linear_unpack(self._packed)
        dense: Tensor = whole.dequantize()
        return dense


class OneDnnMatrix:
    """A matrix of whole numbers [n, k] and scales [n], see `ExactMatrix`."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)
        self._scale, self._zeros = scale, torch.zeros(len(scale), dtype=torch.int64)
        self._product: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.default

    def multiply(self, rows: Tensor) -> Tensor:
        """Rows [r, k] -> their products with the matrix [r, n], see `ExactMatrix`."""
        whole = (rows.round() + _ZERO).clamp(0, 2 * _ZERO - 1).to(torch.uint8)
        matrix: tuple[Any, ...] = (self._packed, self._scale, self._zeros)
        plain_fp32: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        return self._product(whole, 1.0, _ZERO, *matrix, *plain_fp32)

    def dense(self) -> Tensor:
        """The matrix [n, k] in fp32, see `ExactMatrix`."""
        return self._packed.to_dense().t().float() * self._scale[:, None]


def exact_libraries() -> Mapping[str, type[ExactMatrix]]:
    """The libraries that this build of PyTorch has, by names."""
    engines = set(torch.backends.quantized.supported_engines)
    found: dict[str, type[ExactMatrix]] = {}
    if {"x86", "fbgemm"} & engines and (
        hasattr(torch, "_make_per_channel_quantized_tensor")
        and hasattr(torch.ops.quantized, _PRODUCT)
    ):
        found["FBGEMM"] = FbgemmMatrix
    if "onednn" in engines and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        found["oneDNN"] = OneDnnMatrix
    return found


class FastestLibrary:
    """Puts matrices into the layout of the library that multiplies such a one fastest on this
    machine. A shape is tried once."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[int, ...], str] = {}

    def matrix(self, values: Tensor, scale: Tensor) -> ExactMatrix:
        """A matrix of whole numbers [n, k] in int8 and scales [n].

        Raises:
            RuntimeError: no library has exact products.
        """
        shape = tuple(values.shape)
        if shape not in self._chosen:
            self._chosen[shape] = _fastest(*shape)
        return exact_libraries()[self._chosen[shape]](values, scale)


def _fastest(num_outputs: int, num_inputs: int) -> str:
    """The name of the library that is the fastest for a shape, in a few hundredths of a second."""
    libraries = exact_libraries()
    outputs = max(1, min(num_outputs, _MOST_TRIED // num_inputs))
    exact = [name for name in libraries if is_exact(libraries[name], num_inputs)]
    if not exact:
        raise RuntimeError(
            f"the products in 8 bits of {' and '.join(libraries)} are not exact here"
        )
    values = torch.full((outputs, num_inputs), MOST_OF_ROWS, dtype=torch.int8)
    matrices = {name: libraries[name](values, torch.ones(outputs)) for name in exact}
    seconds = dict.fromkeys(exact, 0.0)
    for count in (_FEW, _MANY):
        rows = torch.ones(count, num_inputs)
        best = dict.fromkeys(exact, float("inf"))
        for _ in range(_REPEATS if len(exact) > 1 else 0):
            for name, matrix in matrices.items():
                start = perf_counter()
                matrix.multiply(rows)
                best[name] = min(best[name], perf_counter() - start)
        for name in exact:
            seconds[name] += best[name] / count
    first, *others = exact
    chosen = min(others, key=seconds.__getitem__, default=first)
    if seconds[chosen] > _CLEARLY_FASTER * seconds[first]:
        chosen = first
    _LOG.info(
        "products in 8 bits with [%d, %d] by %s%s",
        num_outputs,
        num_inputs,
        chosen,
        "".join(
            f", {seconds[name] / seconds[chosen]:.1f} times as fast as {name}"
            for name in exact
            if name != chosen
        ),
    )
    return chosen


def is_exact(library: type[ExactMatrix], num_inputs: int) -> bool:
    """Whether the greatest sums of products that there can be are right."""
    signs = torch.tensor([[1], [-1]], dtype=torch.int8)
    values = (signs * 127).expand(2, num_inputs)
    rows = (signs * MOST_OF_ROWS).expand(2, num_inputs).float()
    found = library(values, torch.ones(2)).multiply(rows)
    sums = 127.0 * MOST_OF_ROWS * num_inputs * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return torch.equal(found, sums)
