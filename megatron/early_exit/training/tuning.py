"""EE-Tuning (arXiv 2402.00518): only exits train, each on its own, while the backbone goes forward.

Nothing flows backward through the backbone, so an exit's loss is backpropagated as soon as its
hidden state is there, or, where it learns from the final head, as soon as that has answered.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron.early_exit.model.exit_head import ExitHeads
from megatron.early_exit.training.data import BatchReader
from megatron.early_exit.training.exit_loss import ExitObjective, Targets
from megatron.early_exit.training.head_loss import Teacher
from megatron.early_exit.training.step import LossFunction
from megatron.early_exit.training.tuning_options import TuningOptions


class LocalObjective(ExitObjective):
    """The exits' losses, each backpropagated within its exit as soon as it is computed."""

    def __call__(
        self,
        exits: ExitHeads,
        position: int,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """See `ExitTap`."""
        if not exits.training:
            return super().__call__(exits, position, hidden, labels, loss_mask, layer_kwargs)
        with torch.enable_grad():
            self.train_exit(
                exits, position, hidden.detach(), Targets.of(labels, loss_mask), layer_kwargs
            )
        return hidden


class DistillingObjective(ExitObjective):
    """The exits' losses where a part of them is the divergence from the final head, so that they
    wait for it.

    Args:
        options: how large a part.
        objective: as of `ExitObjective`.
    """

    def __init__(self, options: TuningOptions, *objective: Any) -> None:
        super().__init__(*objective)
        self._options = options
        self._waiting: list[tuple[ExitHeads, int, Tensor, Targets, dict[str, Any]]] = []

    def __call__(
        self,
        exits: ExitHeads,
        position: int,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """See `ExitTap`."""
        if not exits.training:
            return super().__call__(exits, position, hidden, labels, loss_mask, layer_kwargs)
        targets = Targets.of(labels, loss_mask)
        self._waiting.append((exits, position, hidden.detach(), targets, layer_kwargs))
        return hidden

    def learn_from(self, logits: Tensor) -> None:
        """Train the exits that have been passed.

        Args:
            logits: [b, s, v], of the final head; this rank's part of the vocabulary.
        """
        waiting, self._waiting = self._waiting, []
        exits, position, *_ = waiting[0]
        teacher = Teacher.of(
            logits.transpose(0, 1).flatten(0, 1),
            self._options.exit_distillation_weight,
            self._options.exit_distillation_temperature,
            self.options(exits, position),
        )
        with torch.enable_grad():
            for one in waiting:
                self.train_exit(*one, teacher=teacher)


class TuningStep:
    """Reads a microbatch and runs the frozen backbone on it, whose exits train on the way.

    Args:
        reader: source of microbatches.
        objective: of the exits.
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
        self._tokens: Tensor | None = None

    def __call__(
        self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `model` on the next microbatch."""
        self.objective.start_iteration(self.completed_iterations())
        chunk: Any = unwrap_model(model)
        batch = self.reader.read(
            data,
            inputs=chunk.pre_process,
            # The last stage tells Megatron how many tokens there are, exits or none.
            targets=bool(chunk.exits.heads) or is_pp_last_stage(chunk.pg_collection.pp),
            training=chunk.training,
        )
        with torch.no_grad():
            output = model(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels,
                loss_mask=batch.loss_mask,
            )
            if chunk.training and isinstance(self.objective, DistillingObjective):
                self.objective.learn_from(output)
        if chunk.training and batch.loss_mask is not None:
            tokens = batch.loss_mask.sum().to(torch.int)
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
        # Only called on the last stage, which has the mask.
        return output, partial(no_loss, cast(Tensor, batch.loss_mask))

    def count_tokens(self) -> Tensor:
        """Tokens of the microbatches since the last call; only the last stage is asked."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return torch.zeros((), dtype=torch.int, device=torch.cuda.current_device())
        return tokens


def no_loss(loss_mask: Tensor, _: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the last stage reports to Megatron's schedules: there is no final head, or it does not
    train; the exits' losses are measured where they are computed.

    Args:
        loss_mask: [b, s], which tokens count.
    """
    tokens = loss_mask.sum().to(torch.int)
    return torch.zeros((), device=loss_mask.device), tokens, {}
