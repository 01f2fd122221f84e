"""A head whose vocabulary is divided over tensor-parallel ranks computes what a whole one does."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from tests.helpers.plain_loss import relative_error, token_losses
from tests.helpers.spawn import spawn

TOKENS, HIDDEN, VOCAB, RANKS = 19, 16, 48, 2


def compare_with_whole_head(
    temperature: float, confidence_weighted: bool, vocab_size: int | None, fused: bool
) -> dict[str, float]:
    """On each rank: relative errors of its share, and whether equal logits are told apart; with
    `fused` by the functions that a GPU compiles."""
    from megatron.early_exit.training.loss import head_loss as module
    from megatron.early_exit.training.loss.head_loss import HeadLossOptions, head_loss

    module._is_fused = lambda *_: fused
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    whole = torch.randn(VOCAB, HIDDEN, generator=generator) / 4
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    coefficients = torch.rand(TOKENS, generator=generator)
    # The same row on both ranks: the best of two equals is the one with the lower id.
    whole[VOCAB - 1] = whole[0] = 3 * hidden[0]
    labels[0] = VOCAB - 1
    kind = {"temperature": temperature, "confidence_weighted": confidence_weighted}
    kind["vocab_size"] = vocab_size

    rank = torch.distributed.get_rank()
    share = slice(rank * VOCAB // RANKS, (rank + 1) * VOCAB // RANKS)
    weight = Parameter(whole[share].clone())
    options = HeadLossOptions(**kind, chunk_tokens=5, tp_group=torch.distributed.group.WORLD)
    result, gradient = head_loss(hidden, weight, labels, options, coefficients)
    torch.distributed.all_reduce(gradient)

    hidden.requires_grad_()
    whole.requires_grad_()
    logits = hidden @ whole.t()
    (token_losses(logits, labels, **kind) * coefficients).sum().backward()
    losses = token_losses(logits, labels, temperature=temperature, vocab_size=vocab_size).detach()
    choice = logits[:, :vocab_size].argmax(dim=-1)
    return {
        "hidden": relative_error(gradient, hidden.grad),
        "weight": relative_error(weight.grad, whole.grad[share]),
        "loss": relative_error(result.loss, losses),
        "correct": (result.correct - (choice == labels).float()).abs().sum().item(),
        "tie": result.correct[0].item(),
    }


def test_divided_vocabulary():
    # A head with few answers has some of them on each rank, or all on the first.
    for kind in ((1.0, False, None), (2.5, True, None), (0.7, True, 40), (1.0, False, 11)):
        for errors in spawn(compare_with_whole_head, RANKS, *kind, False):
            assert max(errors.values()) < 1e-6, errors


def test_divided_vocabulary_in_fused_functions():
    for errors in spawn(compare_with_whole_head, RANKS, 2.5, True, None, True):
        assert max(errors.values()) < 1e-6, errors
