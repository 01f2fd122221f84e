"""What says which token comes next: the heads of the exits, and the final one."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.inference.model.layers import Mlp
from megatron.early_exit.inference.model.linear import Function
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.segment import Segment


@dataclass(frozen=True, slots=True)
class Head:
    """What turns the residual stream at one place into logits: [mlp] [block] [norm] projection."""

    mlp: Mlp | None
    block: Segment | None
    """The transformer layer that an exit may have; it attends over a cache of its own."""
    norm: Function | None
    projection: Function
    """[n, h] -> [n, v], without padding of the vocabulary; or this rank's part of it."""
    gather: Function | None = None
    """Brings together the logits of ranks that divide the projection."""
    num_others: int = 0
    """Tokens at the end of the vocabulary that it never answers with."""

    def logits(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """Logits [n, v] from the residual stream [r, h], see `features`."""
        return self.project(self.features(hidden, block_pass))

    def features(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """What is projected, [n, h], from the residual stream [r, h].

        With a block `hidden` holds every position that the block has not seen yet, `block_pass`
        describes them, and n is the number of results that it asks for; else n is r.
        """
        if self.mlp is not None:
            hidden = self.mlp(hidden)
        if self.block is not None:
            assert block_pass is not None
            hidden = self.block(hidden, block_pass)
        return hidden if self.norm is None else self.norm(hidden)

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
