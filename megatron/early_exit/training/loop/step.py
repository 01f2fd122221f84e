"""The forward step and the loss function that Megatron's schedules call."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    get_rerun_state_machine,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron.early_exit.model.held_rows import HeldRows
from megatron.early_exit.training.loop.data import BatchReader
from megatron.early_exit.training.loop.held_draws import HeldDraws
from megatron.early_exit.training.loss.exit_loss import EndedAtExit, ExitObjective

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

NUM_ASKED = "tokens that the final head is asked for"
"""What the mean number of them in a microbatch is called among the reports of a step."""

# As in Megatron's pre-training of GPTs.
_SPIKE = 10.0


@dataclass(frozen=True, kw_only=True)
class LossChecks:
    """Which final losses Megatron's rerun state machine looks into, before ranks are averaged.

    Attributes:
        finite: `--check-for-nan-in-loss-and-grad`: NaN and infinite ones, which end the run.
        spikes: `--check-for-spiky-loss`: ten times the largest of the first hundred, which are
            reported.
    """

    finite: bool
    spikes: bool

    def __call__(self, loss: Tensor) -> None:
        machine = get_rerun_state_machine()
        loss = loss.detach()
        if self.finite:
            machine.validate_result(
                loss, lambda value: bool(value.isnan()), "found NaN in the final loss"
            )
            machine.validate_result(
                loss, lambda value: bool(value.isinf()), "found Inf in the final loss"
            )
        if self.spikes:
            is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
            machine.validate_result(loss, is_spike, "Spiky loss", fatal=False)


@contextmanager
def rejected_results() -> Iterator[None]:
    """End a run in one sentence where Megatron's rerun state machine ends it.

    Raises:
        SystemExit: Megatron has rejected a result.
    """
    try:
        yield
    except SystemExit as end:
        if end.code in (EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION):
            print(
                "error: training stopped at the unexpected result above; resume on other hardware "
                "to learn whether this one is at fault, or with --rerun-mode disabled to go on",
                file=sys.stderr,
            )
        raise
    except RuntimeError as error:
        # What the machine raises with --rerun-mode disabled, and in evaluation.
        if "Unexpected result" not in str(error):
            raise
        raise SystemExit(f"error: {error}") from error


def final_loss(
    checks: LossChecks,
    loss_mask: Tensor,
    losses: Tensor,
    asked: Tensor | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the final head's loss over a microbatch, as Megatron's schedules expect it.

    Args:
        checks: made on the sum.
        loss_mask: [b, s], which tokens count at any head.
        losses: [b, s], the loss of each token.
        asked: [b, s], for which of them the final head is asked; None is all.
        weight: of this loss beside those of exits.

    Returns:
        The weighted sum, the number of tokens that count at any head; and for the log the sum and
        the number of those that it is over, and with `asked` also that number and 1: Megatron adds
        each pair up over all microbatches and divides, which gives NaN where nothing was asked.
    """
    mask = loss_mask.reshape(-1).float()
    own = mask if asked is None else mask * asked.reshape(-1)
    # Megatron's own order of operations: another would round otherwise.
    total = torch.sum(losses.reshape(-1).float() * own)
    checks(total)
    tokens = mask.sum().to(torch.int)
    own_tokens = tokens if asked is None else own.sum()
    reports = {"lm loss": torch.stack([total.detach(), own_tokens.float()])}
    if asked is not None:
        reports[NUM_ASKED] = torch.stack([own_tokens.float(), torch.ones_like(total)])
    if weight != 1:
        total = total * weight
    return total, tokens, reports


class RunModel(NamedTuple):
    """What comes of running a model chunk on a microbatch.

    Attributes:
        output: of the chunk, or the hidden state at its last exit where the objective ends the pass
            there.
        loss_mask: [b, s]; the last stage always has it.
        held: the tokens that layers have handed on, if any could be.
    """

    output: Tensor
    loss_mask: Tensor
    held: HeldRows | None


@dataclass(frozen=True)
class ModelStep:
    """Reads a microbatch and runs one model chunk on it.

    Attributes:
        reader: source of microbatches.
        objective: the exits' share of the loss.
        completed_iterations: tells how many iterations are done.
        draws: of the tokens that layers hand on in training; None if they never do.
    """

    reader: BatchReader
    objective: ExitObjective
    completed_iterations: Callable[[], int]
    draws: HeldDraws | None = field(default=None, kw_only=True)

    def run(self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> RunModel:
        """Run `model` on the next microbatch, whose entries are [b, s]."""
        self.objective.start_iteration(self.completed_iterations())
        chunk: Any = unwrap_model(model)
        held = self._draw(chunk)
        batch = self.reader.read(
            data,
            inputs=chunk.needs_inputs,
            targets=chunk.needs_targets,
            training=chunk.training,
        )
        try:
            output = model(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels,
                loss_mask=batch.loss_mask,
                **({} if held is None else {"held": held}),
            )
        except EndedAtExit as end:
            output = end.hidden
        finally:
            # What recomputes activations later must not end there.
            self.objective.ends_at_exit = False
            self.objective.learning_stages = None
        return RunModel(output, cast(Tensor, batch.loss_mask), held)

    def _draw(self, chunk: Any) -> HeldRows | None:
        if self.draws is None or not chunk.training:
            return None
        # Megatron's schedules, and this package's, number the microbatches of a step there.
        held = self.draws.draw(
            self.completed_iterations(), chunk.decoder.layers[0].current_microbatch
        )
        return HeldRows(self.reader.own_tokens(held.frozen_at.cuda()), held.skipped.cuda())


@dataclass(frozen=True)
class ForwardStep(ModelStep):
    """A step of training the whole model.

    Attributes:
        checks: made on the final loss of each microbatch.
    """

    checks: LossChecks

    def __call__(
        self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `model` on the next microbatch; on the last stage its output is the loss [b, s]."""
        output, loss_mask, held = self.run(data, model)
        asked = None if held is None else held.asked_at(held.num_layers)
        weight = self.objective.final_weight
        return output, partial(final_loss, self.checks, loss_mask, asked=asked, weight=weight)
