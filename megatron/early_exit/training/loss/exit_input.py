"""What an exit gets of a microbatch: a hidden state, and the tokens that it should predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.early_exit.model.exit_head import ExitHeads
from megatron.early_exit.training.loss.head_loss import deliver_nothing


@dataclass(frozen=True)
class Targets:
    """What an exit should predict in a microbatch, sequence first as hidden states.

    Attributes:
        labels: [s * b], the tokens.
        mask: [s * b], which of them count here.
        whole_mask: [s * b], which of them count at any head. Losses are means over these, so that
            each token has the same weight at every head that is asked for it.
        final_mask: [s * b], which of them count at the final head, too; a gate learns from these.
        final_tokens: [b, s], what the final head predicts, known at the end of the forward pass;
            None where no gate needs it, or another stage knows it.
    """

    labels: Tensor
    mask: Tensor
    whole_mask: Tensor
    final_mask: Tensor
    final_tokens: Tensor | None = None

    @classmethod
    def of(
        cls,
        labels: Tensor,
        loss_mask: Tensor | None,
        final_tokens: Tensor | None = None,
        asked: Tensor | None = None,
        asked_at_end: Tensor | None = None,
    ) -> Targets:
        """Targets from labels, the mask, the final head's tokens, and the tokens that this exit and
        the final head are asked for, each [b, s]; None is all."""
        mask = torch.ones_like(labels) if loss_mask is None else loss_mask
        whole = mask.t().reshape(-1).float()
        own, final = (
            whole if one is None else whole * one.t().reshape(-1) for one in (asked, asked_at_end)
        )
        return cls(labels.t().reshape(-1), own, whole, final, final_tokens)

    def of_final_head(self) -> Tensor | None:
        """The final head's tokens [s * b], to be called after the forward pass."""
        return None if self.final_tokens is None else self.final_tokens.t().reshape(-1)


@dataclass(frozen=True)
class ExitInput:
    """A microbatch at an exit.

    Attributes:
        exits: the heads of the model chunk.
        position: of the exit.
        hidden: [s, b, h], the residual stream there.
        targets: what the exit should predict.
        layer_kwargs: what the backbone's layers get beside it.
    """

    exits: ExitHeads
    position: int
    hidden: Tensor
    targets: Targets
    layer_kwargs: dict[str, Any]

    def leave_out(self) -> None:
        """Do for data parallelism what the exit would do, and compute nothing: wait for gathered
        parameters, and give all a gradient, of zeros, since as many are expected in each step."""
        shared, head = self.exits.backbone(), self.exits.heads[self.position]
        modules = [head] if shared.norm is None else [head, shared.norm]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if isinstance(shared.weight, Parameter):
            parameters.append(shared.weight)
        for module in modules:
            _wait_for_parameters(module)
        for parameter in parameters:
            if parameter.requires_grad:
                deliver_nothing(parameter)
        if self.hidden.requires_grad:
            self.hidden.grad = torch.zeros_like(self.hidden)


def _wait_for_parameters(module: Module) -> None:
    # Megatron waits in hooks that run before each module.
    for one in module.modules():
        for key, hook in one._forward_pre_hooks.items():
            if key not in one._forward_pre_hooks_with_kwargs:
                hook(one, ())
