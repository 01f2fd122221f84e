"""Checkpoints of small models, written as the converters write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.megatron_args import described_args
from megatron.early_exit.checkpoint.writer import write_checkpoint
from tests.helpers.tiny_models import TinyModel


def lazy_tensors(weights: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors as lazy tensors, which are read when they are needed."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in weights.items()
    }


def write_model(path: Path, model: TinyModel) -> Path:
    """Write a model with its exits and without a tokenizer; returns `path`."""
    description = ModelDescription(model.architecture, model.early_exit, None)
    write_checkpoint(path, lazy_tensors(model.weights), description, described_args(description))
    return path
