"""The forward step and the loss function that Megatron's schedules call."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron.early_exit.training.data import BatchReader
from megatron.early_exit.training.exit_loss import ExitObjective

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def final_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the final head's loss over a microbatch, as Megatron's schedules expect it.

    Args:
        loss_mask: [b, s], which tokens count.
        losses: [b, s], the loss of each token.

    Returns:
        The sum, the number of tokens that count, and both for the log.
    """
    mask = loss_mask.reshape(-1).float()
    # Megatron's own order of operations: another would round otherwise.
    total = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    report = torch.stack([total.detach(), tokens.float()])
    return total, tokens, {"lm loss": report}


class ForwardStep:
    """Reads a microbatch and runs one model chunk on it.

    Args:
        reader: source of microbatches.
        objective: the exits' share of the loss.
        completed_iterations: tells how many iterations are done.
    """

    def __init__(
        self,
        reader: BatchReader,
        objective: ExitObjective,
        completed_iterations: Callable[[], int],
    ) -> None:
        self.reader = reader
        self.objective = objective
        self.completed_iterations = completed_iterations

    def __call__(
        self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `model` on the next microbatch; on the last stage its output is the loss [b, s]."""
        self.objective.start_iteration(self.completed_iterations())
        chunk: Any = unwrap_model(model)
        batch = self.reader.read(
            data,
            inputs=chunk.pre_process,
            targets=chunk.post_process or bool(chunk.exits.heads),
            training=chunk.training,
        )
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
        )
        # Only called on the last stage, which has the mask.
        return output, partial(final_loss, cast(Tensor, batch.loss_mask))
