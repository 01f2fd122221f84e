"""Tensors in formats that torch does not have; the stand-in makes none."""

import torch


class QuantizedTensor(torch.Tensor):
    """What all of them derive from."""
