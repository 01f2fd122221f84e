"""EE-Tuning (arXiv 2402.00518): only exits train, each on its own, while the backbone goes forward.

Nothing flows backward through the backbone, so the exits that a forward pass has gone by are
backpropagated right after it, when the next stage is already at work on what it has sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.generators import Tuning
from megatron.early_exit.schedules.schedule import Schedule
from megatron.early_exit.training.loop.step import LossFunction, ModelStep
from megatron.early_exit.training.loss.exit_input import ExitInput
from megatron.early_exit.training.loss.exit_loss import ExitObjective
from megatron.early_exit.training.loss.head_loss import Teacher
from megatron.early_exit.training.tuning.options import TuningOptions


class LocalObjective(ExitObjective):
    """The exits' losses, each backpropagated within its exit once the forward pass is over."""

    def __init__(self, *objective: Any) -> None:
        super().__init__(*objective)
        self._passed: list[ExitInput] = []

    def in_training(self, exit_input: ExitInput) -> Tensor:
        """Remember the exit; the backbone goes on as if there were none."""
        self._passed.append(replace(exit_input, hidden=exit_input.hidden.detach()))
        return exit_input.hidden

    def finish_forward(self, output: Tensor) -> None:
        """The model has been run on a microbatch.

        Args:
            output: [b, s, v], this rank's part of the final head's logits; hidden states [s, b, h]
                of a model without a final head.
        """

    def backpropagate_passed_exits(self) -> None:
        """Train the exits that the last forward pass has gone by."""
        passed, self._passed = self._passed, []
        teacher = self._teacher(passed)
        with torch.enable_grad():
            for exit_input in passed:
                self.train_exit(exit_input, teacher)

    def _teacher(self, passed: list[ExitInput]) -> Teacher | None:
        del passed
        return None


class DistillingObjective(LocalObjective):
    """The exits' losses where a part of them is the divergence from the final head.

    Args:
        options: how large a part.
        objective: as of `ExitObjective`.
    """

    def __init__(self, options: TuningOptions, *objective: Any) -> None:
        super().__init__(*objective)
        self._options = options
        self._logits: Tensor | None = None

    def finish_forward(self, output: Tensor) -> None:
        """Keep what the final head says."""
        self._logits = output

    def _teacher(self, passed: list[ExitInput]) -> Teacher:
        logits, self._logits = self._logits, None
        assert logits is not None
        return Teacher.of(
            logits.transpose(0, 1),
            self._options.exit_distillation_weight,
            self._options.exit_distillation_temperature,
            self.options(passed[0].exits, passed[0].position),
        )


@dataclass(frozen=True)
class TuningStep(ModelStep):
    """Runs the frozen backbone on a microbatch, whose exits train on the way."""

    objective: LocalObjective

    def __call__(
        self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `model` on the next microbatch."""
        with torch.no_grad():
            output, loss_mask, _ = self.run(data, model)
            if model.training:
                self.objective.finish_forward(output)
        return output, partial(_report, loss_mask)


class TuningPlan:
    """The plan of `ScheduledSteps` for EE-Tuning, on so many stages, of which some have exits."""

    def __init__(self, stages: int, exit_stages: frozenset[int]) -> None:
        self.clock: PassClock | None = None
        self._stages = stages
        # Megatron asks the last stage how many tokens count, also where it has no exit.
        self._tuned_stages = exit_stages | {stages - 1}
        self._schedules: dict[int, Schedule] = {}

    def __call__(self, num_microbatches: int) -> Schedule:
        """Forwards through the pipeline, and the exits' own backwards."""
        if num_microbatches not in self._schedules:
            tuning = Tuning(
                num_ranks=self._stages,
                num_microbatches=num_microbatches,
                exit_stages=self._tuned_stages,
            )
            self._schedules[num_microbatches] = with_communication(tuning.build())
        return self._schedules[num_microbatches]


def _report(loss_mask: Tensor, _: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the last stage tells Megatron's schedules: there is no final head, or it does not
    train, and the exits' losses are measured where they are computed."""
    tokens = loss_mask.sum().to(torch.int)
    return torch.zeros((), device=loss_mask.device), tokens, {}
