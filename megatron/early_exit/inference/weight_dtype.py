"""In which format weights are kept: that of the activations, or fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.model.quantized import (
    SCALE_ENDING,
    TIED_PROJECTION,
    quantize,
    reason_against,
)

WEIGHT_DTYPES = ("int8", "int4")
"""What a command line may ask for."""
_MATRICES = tuple(
    f".{name}.weight" for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
)
_PROJECTIONS = ("output_layer.weight", ".projection.weight")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class WeightQuantizer:
    """Makes of a model's tensors those that are kept.

    Matrices of layers, of the backbone and of exits, become whole numbers with scales, see
    `quantize`; those of heads as well, unless `heads` is False. Everything else, such as embeddings
    and norms, is kept in the format of the activations.

    Attributes:
        dtype: of the activations.
        heads: projections to the vocabulary are quantized, too; of an embedding to which heads are
            tied that is a copy.
    """

    dtype: torch.dtype
    heads: bool = True

    def __call__(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is kept of a whole tensor, by names."""
        own: dict[str, Tensor] = {}
        quantized_as = name
        if name == _EMBEDDING:
            own[name] = tensor.to(self.dtype)
            quantized_as = TIED_PROJECTION
        if self.quantizes(quantized_as):
            values, scale = quantize(tensor)
            return {**own, quantized_as: values, f"{quantized_as}{SCALE_ENDING}": scale}
        return {name: tensor.to(self.dtype)}

    def quantizes(self, name: str) -> bool:
        """Whether a tensor becomes one in fewer bits."""
        return name.endswith(_MATRICES) or (self.heads and name.endswith(_PROJECTIONS))

    def of_model(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of all tensors of a model."""
        return {
            name: kept
            for whole_name, tensor in weights.items()
            for name, kept in self(whole_name, tensor).items()
        }


def make_quantizer(
    weight_dtype: str | None, heads: bool, dtype: torch.dtype, device: torch.device
) -> WeightQuantizer | None:
    """What quantizes weights for a device; None where they are kept as they are computed.

    Args:
        weight_dtype: "int8", or None for the format of the activations.
        heads: see `WeightQuantizer`.
        dtype: of the activations.
        device: where the model is computed.

    Raises:
        ValueError: there are no fast products with such weights here.
    """
    if weight_dtype is None:
        return None
    if weight_dtype == "int4":
        raise ValueError(
            "weight_dtype int4 is not served: PyTorch has no fast product with weights in 4 bits "
            "for CPUs without AVX-512, and none that this engine has been proved with elsewhere; "
            "allowed: int8, or none for the format of the activations"
        )
    if weight_dtype != "int8":
        raise ValueError(
            f"weight_dtype {weight_dtype!r} is unknown, allowed: int8, or none for the format of "
            "the activations"
        )
    reason = reason_against(device)
    if reason is not None:
        raise ValueError(f"weight_dtype int8 is not possible: {reason}")
    return WeightQuantizer(dtype, heads)
