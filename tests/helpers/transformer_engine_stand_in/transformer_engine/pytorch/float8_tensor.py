"""FP8 tensors with one scale; the stand-in makes none."""

from transformer_engine.pytorch.tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """An FP8 tensor."""
