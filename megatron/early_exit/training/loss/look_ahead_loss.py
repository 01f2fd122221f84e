"""The losses of a look-ahead head on a frozen model, and their gradients.

Depth k of row i predicts the token that the final head predicts at row i + k. So what depths learn
are the final head's own targets k rows later; the last k rows of a sequence have none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron.early_exit.model.look_ahead import LookAheadInput
from megatron.early_exit.training.loss.exit_input import Targets
from megatron.early_exit.training.loss.head_loss import HeadLossOptions, Teacher, head_loss
from megatron.early_exit.training.loss.metrics import ExitMetrics
from megatron.early_exit.training.loss.vocabulary import LocalVocabulary

Coefficient = Callable[[float, Targets], Tensor | float]
"""What the loss of a token of these targets is multiplied by, from the weight of their mean."""


@dataclass(frozen=True, kw_only=True)
class LookAheadOptions:
    """How a look-ahead head is trained.

    Attributes:
        depths: how many tokens it looks ahead.
        weight: of the mean of all depths' losses (`--mtp-loss-scaling-factor`).
        chunk_tokens: tokens whose logits exist at a time; None for a default by memory.
        vocab_size: tokens that it learns to tell apart, the first ones; None is all. Drafts need no
            more, and the others take most of the time where the model is small.
    """

    depths: int
    weight: float
    chunk_tokens: int | None = None
    vocab_size: int | None = None

    def metrics(self) -> ExitMetrics:
        """Sums of what the depths measure, named `mtp 1` and so on."""
        return ExitMetrics(tuple(range(1, self.depths + 1)), name="mtp")

    def of_head(self, ahead: LookAheadInput) -> HeadLossOptions:
        """How the loss of each depth is computed, and what a teacher of it is made by."""
        return HeadLossOptions(
            temperature=1.0,
            confidence_weighted=False,
            chunk_tokens=self.chunk_tokens,
            tp_group=ahead.tp_group,
            vocab_size=self.vocab_size,
        )


def look_ahead_loss(
    ahead: LookAheadInput,
    options: LookAheadOptions,
    coefficient: Coefficient,
    metrics: ExitMetrics,
    teacher: Teacher | None = None,
) -> None:
    """Compute the losses of all depths; with gradients enabled, backpropagate them to the head.

    Args:
        ahead: the microbatch.
        options: number of depths, weight, chunks.
        coefficient: see `Coefficient`. As Megatron has it, the mean over the rows that have a
            target counts as much as one over all rows does.
        metrics: gets each depth's loss, and how often its most probable token is the final head's.
        teacher: the final head's distributions at all rows, of which each depth learns those of
            later rows; None where labels alone are learned.
    """
    of_head = options.of_head(ahead)
    targets = Targets.of(ahead.labels, ahead.loss_mask)
    batch, whole = len(ahead.labels), targets.mask.sum()
    vocabulary = LocalVocabulary(ahead.logits.shape[-1], ahead.tp_group, size=None)
    _, tokens = vocabulary.largest(ahead.logits.flatten(0, 1))
    outputs, gradients = [], []
    for depth, states in enumerate(ahead.states(), start=1):
        if ahead.block.config.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, group=ahead.tp_group)
        else:
            states = copy_to_tensor_model_parallel_region(states, group=ahead.tp_group)
        later = slice(depth * batch, None)
        labels, mask = targets.labels[later], targets.mask[later]
        flat = states.flatten(0, 1)[: len(labels)].to(ahead.weight.dtype)
        coefficients = None
        if torch.is_grad_enabled():
            share = whole / mask.sum().clamp(min=1)
            weight = options.weight / options.depths
            coefficients = mask * (coefficient(weight, targets) * share)
        its_teacher = teacher
        if teacher is not None:
            its_teacher = replace(teacher, probabilities=teacher.probabilities[later])
        result, gradient = head_loss(
            *(flat, ahead.weight, labels, of_head, coefficients, its_teacher, tokens[later])
        )
        assert result.agrees is not None
        metrics.add(depth, replace(result, correct=result.agrees), mask)
        if gradient is not None:
            outputs.append(flat)
            gradients.append(gradient)
    if outputs:
        torch.autograd.backward(outputs, gradients)
