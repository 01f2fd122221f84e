"""Runs one rank's list of actions."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.execution.messages import Messages
from megatron.early_exit.schedules.execution.passes import Alive, Passes

_GRADIENTS = ("B", "L")


class Executor:
    """Runs one rank's list of actions, once; what it computes is for `passes` to say.

    Args:
        actions: with sends and receives, see `with_communication`.
        passes: of the rank's model chunk.
        messages: with its neighbours.

    Raises:
        ValueError: there is a kind of action among them that cannot be run.
    """

    def __init__(self, actions: Sequence[Action], passes: Passes, messages: Messages) -> None:
        for action in actions:
            if action.kind in ("I", "W"):
                raise ValueError(f"{action} cannot be run, allowed: F, B, L and messages")
        self._actions = actions
        self._passes = passes
        self._messages = messages
        self._kinds: dict[Microbatch, set[str]] = {}
        for action in actions:
            self._kinds.setdefault(action.microbatch, set()).add(action.kind)
        gradients = [at for at, action in enumerate(actions) if action.kind in _GRADIENTS]
        self._last_gradient = actions[gradients[-1]] if gradients else None
        self._sync = _GradientSync(passes)
        self._alive: dict[Microbatch, Alive] = {}
        self._outputs: dict[Microbatch, Tensor] = {}
        self._gradients: dict[Microbatch, Tensor] = {}

    def run(self) -> None:
        """Run the whole list."""
        self._sync.disable()
        for action in self._actions:
            self._act(action)
        self._messages.end_all_sends()
        self._sync.finish()

    def _act(self, action: Action) -> None:
        if action == self._last_gradient:
            self._sync.enable_for_last()
        match action.kind:
            case "SF":
                free = self._passes.release if action.microbatch in self._alive else _drop
                self._messages.send(action, self._outputs.pop(action.microbatch), free)
            case "SB":
                self._messages.send(action, self._gradients.pop(action.microbatch), _drop)
            case "RF" | "RB":
                self._messages.receive(action)
            case "F":
                self._forward(action.microbatch)
            case "B":
                self._backward(action.microbatch)
            case "L":
                self._passes.workload.exits_backward(action.microbatch)

    def _forward(self, microbatch: Microbatch) -> None:
        kinds = self._kinds[microbatch]
        sends, keeps = "SF" in kinds, "B" in kinds
        hidden = self._messages.take("RF", microbatch)
        ends_at_exit = keeps and not sends and not self._passes.is_last_stage
        output = self._passes.forward(microbatch, hidden, keeps, ends_at_exit)
        if keeps:
            self._alive[microbatch] = Alive(hidden, output)
        if sends:
            self._outputs[microbatch] = output
        elif keeps:
            self._passes.release(output)

    def _backward(self, microbatch: Microbatch) -> None:
        # Megatron wants the memory of what was sent to be free by now.
        self._messages.end_send("SF", microbatch)
        gradient = self._messages.take("RB", microbatch)
        result = self._passes.backward(microbatch, self._alive.pop(microbatch), gradient)
        if "SB" in self._kinds[microbatch]:
            self._gradients[microbatch] = result


def _drop(_: Tensor) -> None:
    """Nothing is left to do for a gradient that has been sent."""


class _GradientSync:
    """Megatron's rules for when data-parallel ranks reduce their gradients: beside the rank's last
    backward, or, where ranks reduce in step, after it on all stages but the first."""

    def __init__(self, passes: Passes) -> None:
        self._config = passes.config
        self._model = passes.model
        self._is_first_stage = passes.is_first_stage
        self._disabled: AbstractContextManager[Any] | None = None

    def disable(self) -> None:
        self._disabled = (self._config.no_sync_func or nullcontext)()
        self._disabled.__enter__()

    def enable_for_last(self) -> None:
        if self._config.grad_sync_func is None or self._is_first_stage:
            self._enable()

    def finish(self) -> None:
        if self._disabled is not None:
            self._enable()
            if self._config.grad_sync_func is not None:
                self._config.grad_sync_func(self._model.parameters())

    def _enable(self) -> None:
        if self._disabled is not None:
            self._disabled.__exit__(None, None, None)
            self._disabled = None
