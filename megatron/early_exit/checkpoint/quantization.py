"""Which matrices of a model are in 8 bits, and how they are rounded.

A matrix `x.weight` [n, k] in 8 bits is whole numbers from -127 to 127 (int8), with one scale for
each output channel in `x.weight_scale` [n] (fp32): their product is the matrix. Checkpoints store
such matrices, and the engine makes them of others when it loads them: by the same functions, so
that the bits are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MOST = 127
"""The largest whole number that stands for a weight."""
SCALE_ENDING = "_scale"
"""The scales of the matrix `x.weight` are `x.weight_scale`."""
_MATRICES = tuple(
    f".{name}.weight"
    for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "eh_proj")
)
_PROJECTIONS = ("output_layer.weight", ".projection.weight")

StoredWeightDtype = Literal["int8"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which matrices of a model are in 8 bits: those of layers, of the backbone and of exits.

    Attributes:
        heads: projections to the vocabulary are, too. The word embedding never is: the engine makes
            its own copy of one that heads are tied to.
        weight_dtype: their format.

    Raises:
        ValueError: the format is unknown.
    """

    heads: bool = True
    weight_dtype: StoredWeightDtype = "int8"

    def __post_init__(self) -> None:
        if self.weight_dtype != "int8":
            raise ValueError(f"weight_dtype {self.weight_dtype!r} is unknown, allowed: int8")

    def covers(self, name: str) -> bool:
        """Whether a tensor becomes one in 8 bits."""
        return name.endswith(_MATRICES) or (self.heads and name.endswith(_PROJECTIONS))

    def with_scales(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of a model's tensors with those of the scales, each behind its matrix."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            found[name] = shape
            if self.covers(name):
                found[f"{name}{SCALE_ENDING}"] = shape[:1]
        return found


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [n, k] -> whole numbers [n, k] in int8, and scales [n] in fp32.

    The greatest entry of a channel by size becomes 127 or -127, the others are rounded to the
    nearest multiple of its 127th part.
    """
    numbers = weight.float()
    scale = numbers.abs().amax(dim=1) / MOST
    divisor = torch.where(scale > 0, scale, 1.0)
    return (numbers / divisor[:, None]).round().clamp(-MOST, MOST).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The matrix [n, k] in fp32 that whole numbers [n, k] and scales [n] stand for."""
    return values.float() * scale[:, None]
