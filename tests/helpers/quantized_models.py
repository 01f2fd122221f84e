"""What a model computes whose weights are kept in 8 bits."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.weight_dtype import WeightQuantizer
from tests.helpers.tiny_models import TinyModel

_MATRICES = (
    *("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"),
    "eh_proj.weight",
    *("output_layer.weight", "exits.1.projection.weight", "exits.2.projection.weight"),
    "exits.3.projection.weight",
)


def rounded(weight: Tensor) -> Tensor:
    """A matrix [n, k] with each row rounded to multiples of the 127th part of its greatest entry
    by size, one entry after another."""
    rows = []
    for row in weight.double().tolist():
        step = max(abs(entry) for entry in row) / 127
        rows.append([round(entry / step) * step if step else 0.0 for entry in row])
    return torch.tensor(rows, dtype=torch.float64).to(weight.dtype)


def rounded_model(model: TinyModel, heads: bool = True) -> TinyModel:
    """The model with rounded matrices, for the oracle; embeddings stay as they are."""
    weights = dict(model.weights)
    for name, tensor in model.weights.items():
        is_head = name.endswith(("output_layer.weight", "projection.weight"))
        if name.endswith(_MATRICES) and (heads or not is_head):
            weights[name] = rounded(tensor)
    if heads:
        embedding = model.weights["embedding.word_embeddings.weight"]
        weights["embedding.projection.weight"] = rounded(embedding)
    return replace(model, weights=weights)


def quantized_model(
    model: TinyModel, heads: bool = True, compile_rows: bool = False
) -> SegmentedModel:
    """The engine's model with weights in 8 bits."""
    weights = WeightQuantizer(torch.float32, Quantization(heads)).of_model(model.weights)
    return SegmentedModel(model.architecture, model.early_exit, weights, compile_rows=compile_rows)
