"""The softmax of a chunk of logits, and the gradient of its cross entropy in the memory of the
logits.

What is read and written of memory decides how long this takes on a GPU. The bytes for each logit,
counted operation by operation (an estimate: what a cache keeps costs less, and what belongs to a
token or a weight and not to a logit is left out):

============================================  ====  ====
operation                                     fp32  bf16
============================================  ====  ====
three products (written once, read twice)       12     6
`FusedSoftmax`, compiled: three reads, a write  16     8
`EagerSoftmax`                                  32    44
============================================  ====  ====

`FusedSoftmax` computes the exponentials twice rather than keep them. `EagerSoftmax` copies other
formats to fp32 and back; it is for CPUs, on which a chunk stays in the cache and exponentials take
long, and for losses that need more of the logits. `tests/unit/training/loss/test_softmax.py` counts
these bytes.
"""

from typing import Protocol

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor

from megatron.early_exit.training.loss.vocabulary import LocalVocabulary


class ChunkSoftmax(Protocol):
    """The softmax of logits [c, v] that are divided by a temperature, over the whole vocabulary.

    Attributes:
        total: [c], the sum of exp(logit - largest logit).
        target: [c], what the label's logit is less than the largest (0 or negative); of a label
            that is no answer, the mean over all answers.
        is_choice: [c], whether the label is the greedy choice.
        agrees: [c], whether another head's token is it; None where none is given.
    """

    total: Tensor
    target: Tensor
    is_choice: Tensor
    agrees: Tensor | None

    def gradient(self, by_softmax: Tensor, by_label: Tensor) -> Tensor:
        """softmax * by_softmax less by_label at the labels, [c, v], in the memory of the logits;
        the amounts are [c]. To be called once, as the last."""


class EagerSoftmax:
    """Computed with one operation after the other.

    Args:
        logits: [c, v] in fp32, this rank's part; their memory is used.
        labels: [c], ids in the whole vocabulary.
        temperature: divisor of the logits.
        vocabulary: what `v` is a part of.
        other_tokens: [c], the greedy choices of another head.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        vocabulary: LocalVocabulary,
        other_tokens: Tensor | None = None,
    ) -> None:
        self._vocabulary, self._labels = vocabulary, labels
        if temperature != 1.0:
            logits /= temperature
        largest, self.is_choice = vocabulary.choice(logits, labels)
        self.agrees = None
        if other_tokens is not None:
            _, self.agrees = vocabulary.choice(logits, other_tokens)
        logits -= largest.unsqueeze(1)
        target = vocabulary.at_labels(logits, labels)
        self._exponentials = logits.exp_()
        sums = torch.stack([self._exponentials.sum(dim=-1), target])
        self.total, self.target = vocabulary.sum(sums).unbind()

    def gradient(self, by_softmax: Tensor, by_label: Tensor) -> Tensor:
        """See `ChunkSoftmax`; [c, v] in fp32."""
        gradient = self._exponentials.mul_((by_softmax / self.total).unsqueeze(1))
        return self._vocabulary.subtract_at_labels(gradient, self._labels, by_label)


class FusedSoftmax:
    """Computed by three functions that Megatron's `jit_fuser` compiles to a kernel each, for heads
    that answer with the whole vocabulary.

    Args:
        logits: [c, v] in the format of the product, this rank's part; their memory is used.
        labels: [c], ids in the whole vocabulary.
        temperature: divisor of the logits.
        vocabulary: what `v` is a part of.
        other_tokens: [c], the greedy choices of another head.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        vocabulary: LocalVocabulary,
        other_tokens: Tensor | None = None,
    ) -> None:
        self._logits = logits
        self._index, self._is_here = vocabulary.places(labels)
        # A tensor, because a number would be compiled in.
        temperatures = torch.full((len(labels), 1), temperature, device=logits.device)
        largest, token = vocabulary.largest_of_ranks(*_largest(logits))
        self.is_choice = token == labels
        self.agrees = None if other_tokens is None else token == other_tokens
        self._scaling = temperatures, largest.unsqueeze(1) / temperatures
        target = _shifted(logits.gather(1, self._index), *self._scaling).squeeze(1)
        target = torch.where(self._is_here, target, 0)
        total = _sum_of_exponentials(logits, *self._scaling)
        self.total, self.target = vocabulary.sum(torch.stack([total, target])).unbind()

    def gradient(self, by_softmax: Tensor, by_label: Tensor) -> Tensor:
        """See `ChunkSoftmax`; [c, v] in the format of the logits."""
        _overwrite_with_gradient(
            self._logits,
            *self._scaling,
            (by_softmax / self.total).unsqueeze(1),
            self._index,
            (by_label * self._is_here).unsqueeze(1),
        )
        return self._logits


def _shifted(logits: Tensor, temperatures: Tensor, largest: Tensor) -> Tensor:
    """In fp32, divided and less the largest, which are both [c, 1]."""
    return logits.float() / temperatures - largest


@jit_fuser
def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row in fp32, and the first place where it is, each [c]."""
    largest, place = logits.max(dim=-1)
    return largest.float(), place


@jit_fuser
def _sum_of_exponentials(logits: Tensor, temperatures: Tensor, largest: Tensor) -> Tensor:
    """The sum of exp(logit - largest) of each row, [c] in fp32."""
    return _shifted(logits, temperatures, largest).exp().sum(dim=-1)


@jit_fuser
def _overwrite_with_gradient(
    logits: Tensor,
    temperatures: Tensor,
    largest: Tensor,
    factor: Tensor,
    index: Tensor,
    at_index: Tensor,
) -> None:
    """exp(logit - largest) * factor less `at_index` in the column `index`; all but `logits` [c, 1].

    The label's column is found by comparison: to write to it afterwards would be one more kernel.
    """
    gradient = _shifted(logits, temperatures, largest).exp() * factor
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = gradient - torch.where(columns == index, at_index, 0)
    logits.copy_(gradient)
