"""EE-Tuning (arXiv 2402.00518): only exits train, each on its own, while the backbone goes forward.

Nothing flows backward through the backbone, so an exit's loss is backpropagated as soon as its
hidden state is there, or, where it learns from the final head, as soon as that has answered.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.training.data import BatchReader
from megatron.early_exit.training.exit_loss import ExitObjective, Passage
from megatron.early_exit.training.head_loss import Teacher
from megatron.early_exit.training.step import LossFunction, ModelStep
from megatron.early_exit.training.tuning_options import TuningOptions


class LocalObjective(ExitObjective):
    """The exits' losses, each backpropagated within its exit as soon as it is computed."""

    def in_training(self, passage: Passage) -> Tensor:
        """Train the exit; the backbone goes on as if there were none."""
        with torch.enable_grad():
            self.train_exit(replace(passage, hidden=passage.hidden.detach()))
        return passage.hidden

    def finish(self, output: Tensor) -> None:
        """The model has been run on a microbatch.

        Args:
            output: [b, s, v], this rank's part of the final head's logits; hidden states [s, b, h]
                of a model without a final head.
        """


class DistillingObjective(LocalObjective):
    """The exits' losses where a part of them is the divergence from the final head, so that they
    wait for it.

    Args:
        options: how large a part.
        objective: as of `ExitObjective`.
    """

    def __init__(self, options: TuningOptions, *objective: Any) -> None:
        super().__init__(*objective)
        self._options = options
        self._waiting: list[Passage] = []

    def in_training(self, passage: Passage) -> Tensor:
        self._waiting.append(replace(passage, hidden=passage.hidden.detach()))
        return passage.hidden

    def finish(self, output: Tensor) -> None:
        """Train the exits that have been passed, on what the final head says."""
        waiting, self._waiting = self._waiting, []
        teacher = Teacher.of(
            output.transpose(0, 1).flatten(0, 1),
            self._options.exit_distillation_weight,
            self._options.exit_distillation_temperature,
            self.options(waiting[0].exits, waiting[0].position),
        )
        with torch.enable_grad():
            for passage in waiting:
                self.train_exit(passage, teacher)


class TuningStep(ModelStep):
    """Runs the frozen backbone on a microbatch, whose exits train on the way.

    Args:
        reader: source of microbatches.
        objective: of the exits.
        completed_iterations: tells how many iterations are done.
    """

    def __init__(
        self,
        reader: BatchReader,
        objective: LocalObjective,
        completed_iterations: Callable[[], int],
    ) -> None:
        super().__init__(reader, objective, completed_iterations)
        self._local = objective
        self._tokens: Tensor | None = None

    def __call__(
        self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `model` on the next microbatch."""
        with torch.no_grad():
            output, loss_mask = self.run(data, model)
            if model.training:
                self._local.finish(output)
        return output, partial(self._report, loss_mask, model.training)

    def _report(
        self, loss_mask: Tensor, counts: bool, _: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the last stage tells Megatron's schedules: there is no final head, or it does not
        train, and the exits' losses are measured where they are computed."""
        tokens = loss_mask.sum().to(torch.int)
        if counts:
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
        return torch.zeros((), device=loss_mask.device), tokens, {}

    def count_tokens(self) -> Tensor:
        """Tokens that were trained on since the last call; only the last stage knows."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return torch.zeros((), dtype=torch.int, device=torch.cuda.current_device())
        return tokens
