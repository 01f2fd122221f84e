"""EE-Tuning (arXiv 2402.00518): only exits train, each on its own, while the backbone goes forward;
and a look-ahead head at its end.

Nothing flows backward through the backbone, so the heads that a forward pass has gone by are
backpropagated right after it, when the next stage is already at work on what it has sent; or, where
gates learn from a final head on another stage, as soon as that has seen the microbatch.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.early_exit.model.look_ahead import LookAheadInput
from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.generators import Tuning
from megatron.early_exit.schedules.schedule import Schedule
from megatron.early_exit.training.loop.step import LossFunction, ModelStep
from megatron.early_exit.training.loss.exit_input import ExitInput
from megatron.early_exit.training.loss.exit_loss import ExitObjective
from megatron.early_exit.training.loss.head_loss import HeadLossOptions, Teacher
from megatron.early_exit.training.loss.look_ahead_loss import LookAheadOptions, look_ahead_loss
from megatron.early_exit.training.tuning.options import TuningOptions


class LocalObjective(ExitObjective):
    """The losses of exits and of a look-ahead head, each backpropagated within its head once the
    forward pass is over.

    Args:
        objective: as of `ExitObjective`.
        ahead: how the look-ahead head is trained; None without one.
    """

    def __init__(self, *objective: Any, ahead: LookAheadOptions | None = None) -> None:
        super().__init__(*objective)
        self._passed: deque[ExitInput] = deque()
        self._reached: LookAheadInput | None = None
        self._ahead = ahead
        if ahead is not None:
            self._ahead_metrics = {training: ahead.metrics() for training in (True, False)}

    def in_training(self, exit_input: ExitInput) -> Tensor:
        """Remember the exit; the backbone goes on as if there were none."""
        self._passed.append(replace(exit_input, hidden=exit_input.hidden.detach()))
        return exit_input.hidden

    def look_ahead(self, ahead: LookAheadInput) -> None:
        """Remember the look-ahead head; in evaluation its losses are measured at once."""
        if ahead.block.training:
            self._reached = ahead
        else:
            self._run_ahead(ahead)

    def take_means(
        self, groups: ProcessGroupCollection, device: torch.device, training: bool
    ) -> dict[str, Tensor]:
        """As of `ExitObjective`; with the look-ahead head's loss and accuracy at each depth N as
        `mtp N`. Accuracy is how often its most probable token is the final head's."""
        means = super().take_means(groups, device, training)
        if self._ahead is not None:
            means |= self._ahead_metrics[training].take_means(groups, device)
        return means

    def finish_forward(self, output: Tensor) -> None:
        """The model has been run on a microbatch.

        Args:
            output: [b, s, v], this rank's part of the final head's logits; hidden states [s, b, h]
                of a model without a final head.
        """

    def backpropagate_passed_exits(self) -> None:
        """Train the exits of the earliest forward pass whose exits have yet to be trained, and the
        look-ahead head that the last one has reached."""
        exits = self._passed[0].exits.heads if self._passed else ()
        passed = [self._passed.popleft() for _ in exits]
        ahead, self._reached = self._reached, None
        if passed:
            teacher = self._teacher(self.options(passed[0].exits, passed[0].position))
            with torch.enable_grad():
                for exit_input in passed:
                    self.train_exit(exit_input, teacher)
        if ahead is not None:
            self._train_ahead(ahead)

    def _train_ahead(self, ahead: LookAheadInput) -> None:
        assert self._ahead is not None
        teacher = self._teacher(self._ahead.of_head(ahead))
        with torch.enable_grad():
            self._run_ahead(ahead, teacher)

    def _run_ahead(self, ahead: LookAheadInput, teacher: Teacher | None = None) -> None:
        assert self._ahead is not None
        metrics = self._ahead_metrics[ahead.block.training]
        look_ahead_loss(ahead, self._ahead, self._coefficient, metrics, teacher)

    def _teacher(self, options: HeadLossOptions) -> Teacher | None:
        del options
        return None


class DistillingObjective(LocalObjective):
    """The losses of heads where a part of them is the divergence from the final head.

    Args:
        options: how large a part.
        objective: as of `ExitObjective`.
        ahead: as of `LocalObjective`.
    """

    def __init__(
        self, options: TuningOptions, *objective: Any, ahead: LookAheadOptions | None = None
    ) -> None:
        super().__init__(*objective, ahead=ahead)
        self._options = options
        self._logits: Tensor | None = None
        self._teachers: dict[int | None, Teacher] = {}

    def finish_forward(self, output: Tensor) -> None:
        """Keep what the final head says."""
        self._logits = output

    def backpropagate_passed_exits(self) -> None:
        """See `LocalObjective`."""
        super().backpropagate_passed_exits()
        self._logits = None
        self._teachers.clear()

    def _teacher(self, options: HeadLossOptions) -> Teacher:
        assert self._logits is not None
        if options.vocab_size not in self._teachers:
            # One at a time: it is as large as the logits.
            self._teachers = {
                options.vocab_size: Teacher.of(
                    self._logits.transpose(0, 1),
                    self._options.exit_distillation_weight,
                    self._options.exit_distillation_temperature,
                    options,
                )
            }
        return self._teachers[options.vocab_size]


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
    """The plan of `ScheduledSteps` for EE-Tuning.

    Args:
        stages: of the pipeline.
        exit_stages: the stages that have exits.
        has_gates: these exits have gates, which learn what the last stage says.
    """

    def __init__(self, stages: int, exit_stages: frozenset[int], has_gates: bool = False) -> None:
        self.clock: PassClock | None = None
        self._stages, self._has_gates = stages, has_gates
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
                learns_from_last=self._has_gates,
            )
            self._schedules[num_microbatches] = with_communication(tuning.build())
        return self._schedules[num_microbatches]


def _report(loss_mask: Tensor, _: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the last stage tells Megatron's schedules: there is no final head, or it does not
    train, and the exits' losses are measured where they are computed."""
    tokens = loss_mask.sum().to(torch.int)
    return torch.zeros((), device=loss_mask.device), tokens, {}
