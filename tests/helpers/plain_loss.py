"""The loss of an output projection, computed plainly: all logits at once, gradients by autograd."""

import torch
from torch import Tensor
from torch.nn import functional


def token_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    confidence_weighted: bool = False,
    vocab_size: int | None = None,
) -> Tensor:
    """The contribution of each token to the objective, [n], for logits [n, v]. A head may have only
    the first `vocab_size` of them; any other label then counts as a uniform target over these."""
    logits = logits[:, :vocab_size].float() / temperature
    logprobs = functional.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, labels.clamp(max=logits.shape[1] - 1)[:, None]).squeeze(1)
    losses = -torch.where(labels < logits.shape[1], own, logprobs.mean(dim=-1))
    if confidence_weighted:
        losses = losses * torch.softmax(logits.detach(), dim=-1).amax(dim=-1)
    return losses


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm; |found| if the expected value is
    zero."""
    difference = (found.double() - expected.double()).norm()
    size = expected.double().norm()
    return (difference / size if size > 0 else difference).item()
