"""Training steps by schedules of our own, in the place of Megatron's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.early_exit.schedules.actions import Microbatch
from megatron.early_exit.schedules.check import check
from megatron.early_exit.schedules.execution.contributions import Contributions
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.execution.training_step import run_training_step
from megatron.early_exit.schedules.schedule import Schedule
from megatron.early_exit.training.loss.exit_loss import ExitObjective


class StepPlan(Protocol):
    """Decides what a step does.

    Attributes:
        clock: times the passes of the next step.
    """

    clock: PassClock | None

    def __call__(self, num_microbatches: int) -> Schedule:
        """The schedule of the next step, with sends and receives; called once for each on all ranks
        alike. A new object is proved before it is run, so equal steps should have the same one."""


@dataclass
class ScheduledSteps:
    """Training steps by lists of actions, as a plan chooses them; for `train_by`."""

    objective: ExitObjective
    plan: StepPlan
    _proved: list[Schedule] = field(default_factory=list, init=False)

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: list[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        force_all_reduce: bool = False,
        **others: Any,
    ) -> list[Any]:
        """Run one step; takes the arguments of Megatron's schedules.

        Returns:
            What the last stage's forwards reported, empty on the others.

        Raises:
            ValueError: an argument is given that these steps know nothing of.
            ScheduleError: the schedule cannot run.
        """
        if unknown := sorted(name for name, value in others.items() if value is not None):
            raise ValueError(f"steps by lists take no {', '.join(unknown)}")
        (chunk,) = model
        schedule = self.plan(num_microbatches)
        if not any(schedule is known for known in self._proved):
            check(schedule)
            self._proved.append(schedule)
        contributions = Contributions.of(schedule)
        stage = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["pp"]).pp.rank()
        on_last, here = (contributions.to_losses(s) for s in (schedule.num_ranks - 1, stage))
        self.objective.start_step(on_last / here, here / contributions.to_gates(stage))
        order = [a.microbatch for a in schedule.ranks[0] if a.kind == "F"]
        data = _StepData(data_iterator, order)
        reports = run_training_step(
            schedule,
            contributions,
            _Workload(data, self.objective, schedule),
            forward_step_func=forward_step_func,
            data=data,
            model=chunk,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            force_all_reduce=force_all_reduce,
            clock=self.plan.clock,
        )
        data.finish()
        self.objective.reaches_final_head = True
        return reports


class _StepData:
    """Gives out each microbatch of a step when it is asked for.

    All stages draw the same microbatches from their copies of the data in the same order, so a
    microbatch is the same samples on each of them. What a stage draws before it needs it is kept.

    Args:
        data: an iterator that goes on over the steps.
        order: in which the microbatches of the step are drawn.
    """

    def __init__(self, data: Any, order: Sequence[Microbatch]) -> None:
        self._data = data
        self._order = list(order)
        self._drawn: dict[Microbatch, Any] = {}
        self._selected: Microbatch | None = None
        self._num_drawn = 0

    def select(self, microbatch: Microbatch) -> int:
        """Choose the microbatch that is asked for next; returns its place in the order."""
        self._selected = microbatch
        return self._order.index(microbatch)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The selected microbatch, once."""
        assert self._selected is not None
        while self._selected not in self._drawn:
            self._draw()
        return self._drawn.pop(self._selected)

    def _draw(self) -> None:
        self._drawn[self._order[self._num_drawn]] = next(self._data)
        self._num_drawn += 1

    def finish(self) -> None:
        """Draw what this stage has not worked on, if it draws at all: others have."""
        while 0 < self._num_drawn < len(self._order):
            self._draw()
        self._drawn.clear()


@dataclass(frozen=True)
class _Workload:
    data: _StepData
    objective: ExitObjective
    schedule: Schedule

    def begin_forward(self, microbatch: Microbatch, ends_at_exit: bool) -> int:
        self.objective.ends_at_exit = ends_at_exit
        self.objective.learning_stages = self._learning_stages.get(microbatch, frozenset())
        return self.data.select(microbatch)

    @cached_property
    def _learning_stages(self) -> dict[Microbatch, frozenset[int]]:
        """The stages on which each microbatch runs backward."""
        stages: dict[Microbatch, set[int]] = {}
        for rank in self.schedule.ranks:
            for action in rank:
                if action.kind in ("B", "L"):
                    stages.setdefault(action.microbatch, set()).add(action.stage)
        return {microbatch: frozenset(found) for microbatch, found in stages.items()}

    def begin_backward(self, microbatch: Microbatch) -> None:
        # The others all run forward to the end, whether they run backward on each stage or not.
        self.objective.reaches_final_head = microbatch.role != "w"

    def exits_backward(self, microbatch: Microbatch) -> None:
        del microbatch
        self.objective.backpropagate_passed_exits()
