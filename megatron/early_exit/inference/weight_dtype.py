"""In which format weights are kept: that of the activations, or fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.quantization import SCALE_ENDING, Quantization, quantize
from megatron.early_exit.inference.model.quantized import (
    TIED_PROJECTION,
    is_quantized,
    reason_against,
)

WEIGHT_DTYPES = ("int8", "int4")
"""What a command line may ask for."""
NO_INT4 = (
    "is not served: PyTorch's products with weights in 4 bits are no faster than those in 8 bits "
    "on CPUs with AVX2, and have not been proved with this engine on others; allowed: int8"
)
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class WeightQuantizer:
    """Makes of a model's tensors those that are kept.

    Matrices that `quantization` covers become whole numbers with scales, see `quantize`, unless
    they are stored as such. Everything else, such as embeddings and norms, is kept in the format of
    the activations. Of an embedding to which heads are tied there is a copy in 8 bits where heads
    are.

    Attributes:
        dtype: of the activations.
        quantization: which matrices are in 8 bits.
    """

    dtype: torch.dtype
    quantization: Quantization

    def __call__(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is kept of a whole tensor, by names."""
        if is_quantized(tensor) or name.endswith(f".weight{SCALE_ENDING}"):
            return {name: tensor}
        own: dict[str, Tensor] = {}
        quantized_as = name
        if name == _EMBEDDING:
            own[name] = tensor.to(self.dtype)
            quantized_as = TIED_PROJECTION
        if self.quantization.covers(quantized_as):
            values, scale = quantize(tensor)
            return {**own, quantized_as: values, f"{quantized_as}{SCALE_ENDING}": scale}
        return {name: tensor.to(self.dtype)}

    def of_model(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of all tensors of a model, of any shape."""
        return {
            name: kept
            for whole_name, tensor in weights.items()
            for name, kept in self(whole_name, tensor).items()
        }


def make_quantizer(
    weight_dtype: str | None,
    heads: bool | None,
    dtype: torch.dtype,
    device: torch.device,
    stored: Quantization | None = None,
) -> WeightQuantizer | None:
    """What quantizes weights for a device; None where they are kept as they are computed.

    Args:
        weight_dtype: "int8"; None is as the model is stored, or the format of the activations.
        heads: see `Quantization`; None is as the model is stored, or all.
        dtype: of the activations.
        device: where the model is computed.
        stored: which matrices of the checkpoint are in 8 bits; None where none is.

    Raises:
        ValueError: there are no fast products with such weights here, or the model is stored with
            other matrices in 8 bits.
    """
    if stored is not None:
        weight_dtype = weight_dtype or stored.weight_dtype
        if heads is not None and heads != stored.heads:
            kept = "are in 8 bits" if stored.heads else "keep their format"
            raise ValueError(
                f"quantize_heads {heads} is not possible: in this checkpoint projections to the "
                f"vocabulary {kept}, allowed: {stored.heads}"
            )
        heads = stored.heads
    if weight_dtype is None:
        return None
    if weight_dtype == "int4":
        raise ValueError(f"weight_dtype int4 {NO_INT4}, or none for the format of the activations")
    if weight_dtype != "int8":
        raise ValueError(
            f"weight_dtype {weight_dtype!r} is unknown, allowed: int8, or none for the format of "
            "the activations"
        )
    reason = reason_against(device)
    if reason is not None:
        raise ValueError(f"weight_dtype int8 is not possible: {reason}")
    return WeightQuantizer(dtype, Quantization(heads is not False))
