"""FP8 tensors with one scale; the stand-in makes none."""

from transformer_engine.pytorch.tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """Stands in for the class of parameters that are stored in FP8."""
