"""Rows of a layer's output that are its input: tokens whose residual stream is held there.

This is how a layer is skipped for a sequence in training, and how a token leaves at an exit while
later tokens still attend to it: its keys and values of the layers behind come from the held state,
by each layer's own norm and projections. The layers are computed as they are, for all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_PACKED_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class HeldRows:
    """The tokens of a microbatch that layers hand on unchanged.

    Attributes:
        frozen_at: [b, s], integers: the position of the exit behind which a token is held, the
            number of layers for one that is not.
        skipped: [b, number of layers], booleans: the layers that all of a sequence skips.
    """

    frozen_at: Tensor
    skipped: Tensor

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.skipped.shape[1]

    def of_layer(self, number: int) -> Tensor:
        """Which tokens layer `number`, counted from 1, hands on, [b, s]."""
        return (self.frozen_at < number) | self.skipped[:, number - 1 : number]

    def asked_at(self, position: int) -> Tensor:
        """The tokens that have not left before the exit at `position`, [b, s]. At the number of
        layers they are those of the final head."""
        return self.frozen_at >= position

    def pack(self, loss_mask: Tensor | None) -> Tensor:
        """This and a loss mask [b, s] in one tensor, [1, b, 2 s + number of layers], which goes
        through activation recomputation as a mask does."""
        if loss_mask is None:
            loss_mask = torch.ones_like(self.frozen_at, dtype=torch.float32)
        parts = (loss_mask, self.frozen_at, self.skipped)
        return torch.cat([part.to(loss_mask.dtype) for part in parts], dim=1).unsqueeze(0)


def unpack(mask: Tensor | None, num_layers: int) -> tuple[Tensor | None, HeldRows | None]:
    """The loss mask [b, s], and what was packed with it, if anything was.

    Args:
        mask: a loss mask, or what `HeldRows.pack` made of one.
        num_layers: layers of the model.
    """
    if mask is None or mask.dim() != _PACKED_DIMENSIONS:
        return mask, None
    packed = mask[0]
    length = (packed.shape[1] - num_layers) // 2
    loss_mask, frozen_at, skipped = packed.split([length, length, num_layers], dim=1)
    return loss_mask, HeldRows(frozen_at.long(), skipped.bool())


def hold_rows(layers: Iterable[Any], num_layers: int, tp_group: ProcessGroup) -> None:
    """Let layers hand on the rows that are packed into their `context_mask`; without any they do
    what they always do. To be called before anything else that looks at their outputs.

    Args:
        layers: Megatron's transformer layers.
        num_layers: of the model.
        tp_group: the ranks that divide a sequence among themselves with sequence parallelism.
    """
    for layer in layers:
        hook = _Blend(num_layers, tp_group)
        layer.register_forward_hook(hook, with_kwargs=True)


@dataclass(frozen=True, slots=True)
class _Blend:
    num_layers: int
    tp_group: ProcessGroup

    def __call__(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        del args
        _, held = unpack(kwargs.get("context_mask"), self.num_layers)
        if held is None:
            return output
        rows = held.of_layer(layer.layer_number).t()
        if layer.config.sequence_parallel:
            size = torch.distributed.get_world_size(self.tp_group)
            rows = rows.chunk(size)[torch.distributed.get_rank(self.tp_group)]
        before, after = kwargs["hidden_states"], output[0]
        # The result has the strides of the first argument, and what stages send is contiguous.
        rows = rows.contiguous().unsqueeze(2)
        return (torch.where(rows, before.to(after.dtype), after), *output[1:])
