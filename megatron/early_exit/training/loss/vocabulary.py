"""The part of a vocabulary that one tensor-parallel rank has."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


class LocalVocabulary:
    """This rank's part of the tokens that a head can answer with.

    Args:
        rows: of the projection, on each rank.
        group: the ranks that the vocabulary is divided over.
        size: tokens that the head can answer with, the first ones; None is all.

    Attributes:
        rows: of the projection that are of use here.
        answers: of these rows, the first ones, that stand for tokens the head can answer with.
    """

    def __init__(self, rows: int, group: ProcessGroup, size: int | None) -> None:
        self._group, self._size = group, size
        self._is_divided = torch.distributed.get_world_size(group) > 1
        self._start = torch.distributed.get_rank(group) * rows
        self.answers = rows if size is None else min(max(size - self._start, 0), rows)
        # Ranks that have no answer still take part in the sums.
        self.rows = rows if self._is_divided else self.answers

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [c, rows], where what is no answer is impossible, in the same memory."""
        if self.answers < self.rows:
            logits[:, self.answers :] = -torch.inf
        return logits

    def sum(self, values: Tensor) -> Tensor:
        """Sum values of any shape over the ranks, in the same memory."""
        if self._is_divided:
            torch.distributed.all_reduce(values, group=self._group)
        return values

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [c] over the whole vocabulary, and the lowest token that has it."""
        return self.largest_of_ranks(*logits.max(dim=-1))

    def largest_of_ranks(self, local: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """As `largest`, from this rank's largest logit [c] and its (lowest) row [c] here."""
        token = row + self._start
        if not self._is_divided:
            return local, token
        largest = local.clone()
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=self._group)
        token = torch.where(local == largest, token, torch.iinfo(token.dtype).max)
        torch.distributed.all_reduce(token, op=ReduceOp.MIN, group=self._group)
        return largest, token

    def choice(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [c] over the whole vocabulary, and whether the label is the lowest
        token that has it."""
        if self._is_divided or logits.is_cuda:
            largest, token = self.largest(logits)
            return largest, token == labels
        # To find the place of the largest value takes a CPU seven times as long as to find the
        # value, so the label's is compared with the largest of the others.
        index, is_here = self.places(labels)
        kept = logits.gather(1, index)
        own = kept.squeeze(1).masked_fill(~is_here, -torch.inf)
        logits.scatter_(1, index, kept.masked_fill(is_here.unsqueeze(1), -torch.inf))
        others = logits.amax(dim=-1)
        logits.scatter_(1, index, kept)
        is_choice = own > others
        tied = (own == others).nonzero().squeeze(1)
        if len(tied):
            is_choice[tied] = logits[tied].argmax(dim=-1) == labels[tied]
        return torch.maximum(own, others), is_choice

    def softmax(self, logits: Tensor) -> Tensor:
        """Probabilities [c, rows] over the whole vocabulary, in the memory of `logits`."""
        largest, _ = self.largest(logits)
        exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
        return exponentials.div_(self.sum(exponentials.sum(dim=-1)).unsqueeze(1))

    def at_labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """Pick from [c, rows] the values [c] at the labels: summed over the ranks they are what the
        whole vocabulary has there, and for a label that is no answer the mean over all answers."""
        index, is_here = self.places(labels)
        found = torch.where(is_here, values.gather(1, index).squeeze(1), 0)
        if self._size is None:
            return found
        mean = values[:, : self.answers].sum(dim=-1) / self._size
        return torch.where(labels < self._size, found, mean)

    def subtract_at_labels(self, values: Tensor, labels: Tensor, amounts: Tensor) -> Tensor:
        """Take `amounts` [c] from [c, rows] at the labels, or evenly from all answers where a label
        is none, in the same memory."""
        index, is_here = self.places(labels)
        values.scatter_add_(1, index, -(amounts * is_here).unsqueeze(1))
        evenly = self.evenly(labels, amounts)
        if evenly is not None:
            values[:, : self.answers] -= evenly.unsqueeze(1)
        return values

    def answers_of(self, logits: Tensor) -> Tensor:
        """Probabilities of the answers [c, rows] by logits [c, r] of all tokens, r at least `rows`:
        what the other tokens have is spread evenly. The memory of `logits` is used."""
        if self._size is None:
            return self.softmax(logits)
        largest, _ = self.largest(logits)
        exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
        total = self.sum(exponentials.sum(dim=-1))
        own = exponentials[:, : self.rows] / total.unsqueeze(1)
        own[:, self.answers :] = 0
        rest = 1 - self.sum(own.sum(dim=-1))
        own[:, : self.answers] += (rest / self._size).unsqueeze(1)
        return own

    def places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as row numbers [c, 1] here, and whether they are."""
        local = labels - self._start
        is_here = (local >= 0) & (local < self.answers)
        return local.clamp(0, self.rows - 1).unsqueeze(1), is_here

    def evenly(self, labels: Tensor, amounts: Tensor) -> Tensor | None:
        """What each answer has of `amounts` [c] that are divided over all of them where a label is
        none; None where every label is an answer."""
        if self._size is None:
            return None
        return amounts * (labels >= self._size) / self._size
