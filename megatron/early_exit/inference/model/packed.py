"""Products with weights in the blocked layout that oneDNN prefers for a few rows.

It is what torch's own compiler does when it freezes a model. One row is multiplied as fast as the
memory gives the weights; eight take little more than the time of one, where plain products take
several times as long: that is what makes batches, and a catch-up of pending positions, cheap.
"""

import torch
from torch import Tensor
from torch.nn import functional

_TYPICAL_ROWS = 8
_FEW_ROWS = 16
"""Up to here each number of rows is multiplied as it is."""
_SIZES_OF_AN_OCTAVE = 8
"""Numbers of rows beyond, from each power of two to the next."""
_WIDE_ROWS = 6
"""Rows that oneDNN's code for AVX-512 takes through a matrix at once. With up to half of them it
does not read as fast as the memory gives: two rows take a quarter to a half longer than six."""
_LARGE = 2**21
"""Bytes of a matrix that takes longer to read than it takes to repeat rows."""


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [n, k] in the blocked layout; the weight itself where this CPU, this build
    of torch or another device has no such products."""
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [r, k] -> x weight^T + bias [r, n].

    oneDNN makes code for each number of rows, and keeps it: many rows are rounded up, so that the
    code for a few sizes serves all, at all times.
    """
    rows = x.shape[0]
    if rows <= _WIDE_ROWS // 2 and _reads_wide(packed):
        return packed_product(x.repeat(_WIDE_ROWS // rows, 1), packed, bias)[:rows]
    if missing := rounded_up(rows) - rows:
        return packed_product(functional.pad(x, (0, 0, 0, missing)), packed, bias)[:rows]
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def _reads_wide(packed: Tensor) -> bool:
    """Whether a matrix is read fastest for `_WIDE_ROWS`."""
    is_large = packed.numel() * packed.element_size() >= _LARGE
    return is_large and torch.backends.cpu.get_cpu_capability() == "AVX512"


def rounded_up(rows: int) -> int:
    """Rows after padding to a size whose kernel is cached, at most an eighth more."""
    if rows <= _FEW_ROWS:
        return rows
    step = (1 << (rows - 1).bit_length()) // (2 * _SIZES_OF_AN_OCTAVE)
    return -(-rows // step) * step


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


# The compiler has its own idea of oneDNN's products, and takes their weights for constants. What it
# knows nothing about it calls, with weights that are given to it like other arguments.
_LIBRARY = torch.library.Library("early_exit", "DEF")
_LIBRARY.define("packed_product(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
for _kind in ("CPU", "MkldnnCPU"):
    _LIBRARY.impl("packed_product", packed_product, _kind)


def _shape_of_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


torch.library.register_fake("early_exit::packed_product", _shape_of_product)
