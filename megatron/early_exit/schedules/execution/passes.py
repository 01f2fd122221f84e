"""The forward and backward passes of one rank's model chunk, by Megatron's own steps."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
)
from torch import Tensor

from megatron.early_exit.schedules.actions import Microbatch
from megatron.early_exit.schedules.execution.pass_clock import PassClock


class Workload(Protocol):
    """What a rank is told of the microbatch that it is about to work on."""

    def begin_forward(self, microbatch: Microbatch, ends_at_exit: bool) -> int:
        """Called before a forward.

        Args:
            microbatch: whose data the model reads next.
            ends_at_exit: nobody needs what comes after the last exit of the model chunk.

        Returns:
            The microbatch's number in the step, the same on all stages.
        """

    def begin_backward(self, microbatch: Microbatch) -> None:
        """Called before a backward."""

    def exits_backward(self, microbatch: Microbatch) -> None:
        """Run the backward of the exits that the microbatch's forward has passed, and of nothing
        else; called in the order of the forwards."""


@dataclass
class Alive:
    """A forward whose backward is to come.

    Attributes:
        hidden: [s, b, h] that came in, or None on the first stage.
        output: [s, b, h] that went out, or the loss.
    """

    hidden: Tensor | None
    output: Tensor


@dataclass(kw_only=True)
class Passes:
    """Megatron's forward and backward steps of a model chunk.

    Attributes:
        forward_step_func: as Megatron's schedules take it.
        data: what it reads from.
        model: the chunk.
        config: Megatron's.
        workload: told of each microbatch.
        contributing: microbatches that a loss on this stage is the mean over.
        gradient_factor: what a gradient is multiplied by that comes from the end of the pipeline.
        context_parallel_size: ranks that a sequence is divided over.
        is_first_stage: the chunk begins with the embedding.
        is_last_stage: the chunk ends with the final loss.
        shape: [s, b, h] of hidden states.
        clock: times the passes.
    """

    forward_step_func: Callable[..., Any]
    data: Iterator[Any]
    model: torch.nn.Module
    config: Any
    workload: Workload
    contributing: int
    gradient_factor: Fraction
    context_parallel_size: int
    is_first_stage: bool
    is_last_stage: bool
    shape: tuple[int, ...]
    clock: PassClock | None = None

    def __post_init__(self) -> None:
        self.reports: list[Any] = []
        self.num_tokens = torch.zeros([], dtype=torch.int, device="cuda")
        self._count = 0

    def forward(
        self, microbatch: Microbatch, hidden: Tensor | None, keeps: bool, ends_at_exit: bool
    ) -> Tensor:
        """Run the chunk on a microbatch.

        Args:
            microbatch: which one.
            hidden: [s, b, h] from the stage before, None on the first.
            keeps: a backward follows.
            ends_at_exit: only the exits' losses are backpropagated from this stage on.

        Returns:
            What the next stage needs [s, b, h], or the loss.
        """
        number = self.workload.begin_forward(microbatch, ends_at_exit)
        clock = self.clock.time("forward") if self.clock else nullcontext()
        with clock, torch.set_grad_enabled(keeps):
            output, num_tokens = forward_step(
                self.forward_step_func,
                self.data,
                self.model,
                self.contributing,
                hidden,
                self.reports,
                self.config,
                self.context_parallel_size,
                is_first_microbatch=self._count == 0,
                current_microbatch=number,
                is_last_stage=self.is_last_stage,
            )
        self._count += 1
        self.num_tokens += num_tokens
        return output

    def release(self, output: Tensor) -> None:
        """Free the memory of a forward's result [s, b, h] that has been sent; its graph remains."""
        deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)

    def backward(self, microbatch: Microbatch, alive: Alive, gradient: Tensor | None) -> Tensor:
        """Backpropagate a microbatch through the chunk.

        Args:
            microbatch: which one.
            alive: its forward.
            gradient: [s, b, h] from the next stage; None where the losses of this one are all.

        Returns:
            The gradient [s, b, h] of what came in; None on the first stage.
        """
        if gradient is None and not self.is_last_stage:
            # Only exits have losses, which add theirs on the way.
            gradient = alive.output.new_zeros(self.shape)
        elif gradient is not None and microbatch.role != "w" and self.gradient_factor != 1:
            gradient = gradient.detach().mul_(float(self.gradient_factor))
        self.workload.begin_backward(microbatch)
        with self.clock.time("backward") if self.clock else nullcontext():
            result: Tensor = backward_step(alive.hidden, alive.output, gradient, self.config)
        return result
