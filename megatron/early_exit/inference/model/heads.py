"""What says which token comes next: the heads of the exits, and the final one."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.inference.model.linear import Function
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.segment import Segment

BranchPart = Function | Segment
"""A part of a head in front of its projection, [r, h] -> [r, h]. A segment is a transformer layer,
which attends over a cache of its own."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns the residual stream at one place into logits: parts of a branch, a projection."""

    branch: tuple[BranchPart, ...]
    projection: Function
    """[n, h] -> [n, v], without padding of the vocabulary; or this rank's part of it."""
    gather: Function | None = None
    """Brings together the logits of ranks that divide the projection."""
    num_others: int = 0
    """Tokens at the end of the vocabulary that it never answers with."""

    @property
    def block(self) -> Segment | None:
        """The transformer layer that an exit may have."""
        return next((part for part in self.branch if isinstance(part, Segment)), None)

    def logits(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """Logits [n, v] from the residual stream [r, h], see `features`."""
        return self.project(self.features(hidden, block_pass))

    def features(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """What is projected, [n, h], from the residual stream [r, h].

        With a block `hidden` holds every position that the block has not seen yet, `block_pass`
        describes them, and n is the number of results that it asks for; else n is r.
        """
        for part in self.branch:
            if isinstance(part, Segment):
                assert block_pass is not None
                hidden = part(hidden, block_pass)
            else:
                hidden = part(hidden)
        return hidden

    def project(self, features: Tensor) -> Tensor:
        """Logits [n, v]."""
        logits = self.projection(features)
        if self.gather is not None:
            logits = self.gather(logits)
        if self.num_others:
            logits = functional.pad(logits, (0, self.num_others), value=-torch.inf)
        return logits


@dataclass(frozen=True, slots=True)
class ModelExit:
    """The exit behind one segment."""

    position: int
    """Number of backbone layers run before it."""
    head: Head
