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
    """

    def __init__(self, rows: int, group: ProcessGroup, size: int | None) -> None:
        self._group, self._size = group, size
        self._is_divided = torch.distributed.get_world_size(group) > 1
        self._start = torch.distributed.get_rank(group) * rows
        self._answers = rows if size is None else min(max(size - self._start, 0), rows)
        # Ranks that have no answer still take part in the sums.
        self.rows = rows if self._is_divided else self._answers

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [c, rows], where what is no answer is impossible, in the same memory."""
        if self._answers < self.rows:
            logits[:, self._answers :] = -torch.inf
        return logits

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the ranks, in the same memory."""
        if self._is_divided:
            torch.distributed.all_reduce(values, group=self._group)
        return values

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [c] over the whole vocabulary, and the lowest token that has it."""
        local, row = logits.max(dim=-1)
        token = row + self._start
        if not self._is_divided:
            return local, token
        largest = local.clone()
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=self._group)
        token = torch.where(local == largest, token, torch.iinfo(token.dtype).max)
        torch.distributed.all_reduce(token, op=ReduceOp.MIN, group=self._group)
        return largest, token

    def softmax(self, logits: Tensor) -> Tensor:
        """Probabilities over the whole vocabulary, in the memory of `logits`."""
        largest, _ = self.largest(logits)
        exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
        return exponentials.div_(self.sum(exponentials.sum(dim=-1)).unsqueeze(1))

    def at_labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """Pick from [c, rows] the values [c] at the labels: summed over the ranks they are what the
        whole vocabulary has there, and for a label that is no answer the mean over all answers."""
        index, is_here = self._places(labels)
        found = torch.where(is_here, values.gather(1, index).squeeze(1), 0)
        if self._size is None:
            return found
        mean = values[:, : self._answers].sum(dim=-1) / self._size
        return torch.where(labels < self._size, found, mean)

    def subtract_at_labels(self, values: Tensor, labels: Tensor, amounts: Tensor) -> Tensor:
        """Take `amounts` [c] from [c, rows] at the labels, or evenly from all answers where a label
        is none, in the same memory."""
        index, is_here = self._places(labels)
        values.scatter_add_(1, index, -(amounts * is_here).unsqueeze(1))
        if self._size is not None:
            evenly = amounts * (labels >= self._size) / self._size
            values[:, : self._answers] -= evenly.unsqueeze(1)
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
        own[:, self._answers :] = 0
        rest = 1 - self.sum(own.sum(dim=-1))
        own[:, : self._answers] += (rest / self._size).unsqueeze(1)
        return own

    def _places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as row numbers [c, 1] here, and whether they are."""
        local = labels - self._start
        is_here = (local >= 0) & (local < self._answers)
        return local.clamp(0, self.rows - 1).unsqueeze(1), is_here
