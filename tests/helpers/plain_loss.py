"""The loss of an output projection the plain way: all logits at once, gradients by autograd."""

import torch
from torch import Tensor
from torch.nn import functional


def token_losses(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, confidence_weighted: bool = False
) -> Tensor:
    """What each token adds to the objective, [n], for logits [n, v]."""
    logits = logits.float() / temperature
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if confidence_weighted:
        losses = losses * torch.softmax(logits.detach(), dim=-1).amax(dim=-1)
    return losses


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm; absolute where nothing is expected."""
    difference = (found.double() - expected.double()).norm()
    size = expected.double().norm()
    return (difference / size if size > 0 else difference).item()
