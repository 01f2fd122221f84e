"""Makes of a model one whose matrices are stored in 8 bits."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.quantization import SCALE_ENDING, Quantization, quantize


def quantize_model(source: Conversion, quantization: Quantization) -> Conversion:
    """The model with its matrices in 8 bits; all other tensors stay as they are.

    The engine loads what this stores as it is, and gives the same bits as if it had rounded the
    matrices of `source` itself.
    """
    weights, sources = {}, {}
    for name, tensor in source.weights.items():
        if not quantization.covers(name):
            weights[name], sources[name] = tensor, source.sources[name]
            continue
        scale = f"{name}{SCALE_ENDING}"
        weights[name] = LazyTensor(tensor.shape, torch.int8, _part(tensor, 0))
        weights[scale] = LazyTensor(tensor.shape[:1], torch.float32, _part(tensor, 1))
        sources[name] = sources[scale] = source.sources[name]
    description = replace(source.description, quantization=quantization, rule=None)
    return Conversion(description, weights, sources, source.args)


def _part(tensor: LazyTensor, index: int) -> Callable[[], Tensor]:
    """What reads a matrix and rounds it, and returns its whole numbers (0) or its scales (1)."""
    return lambda: quantize(tensor.read())[index]
