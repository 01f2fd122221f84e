"""The residual stream at the exit before, which some rules compare with that at an exit.

It may be on an earlier stage: then it comes behind the hidden states of its task.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron.early_exit.inference.distributed.stage_task import StageTask
from megatron.early_exit.inference.model.embedding import Embedding
from megatron.early_exit.inference.model.kv_cache import Span


class StageStreams:
    """What a batch's tasks have had at the exit before, as far as their rules compare it.

    Args:
        tasks: in the order of their rows.
        before: by the task's place, [1, h] of its last position.
    """

    def __init__(self, tasks: Sequence[StageTask], before: Mapping[int, Tensor]) -> None:
        self._ends = list(accumulate(task.num_rows for task in tasks))
        self._before = dict(before)

    @classmethod
    def of_tokens(cls, tasks: Sequence[StageTask], embedding: Embedding) -> "StageStreams":
        """Those of tasks in front of the first stage: what the residual stream begins with."""
        return cls(
            tasks,
            {
                place: embedding.of_spans(
                    task.tokens[-1:], [Span(task.slot, task.end - 1, task.end)]
                )
                for place, task in enumerate(tasks)
                if task.compares
            },
        )

    @classmethod
    def of_received(
        cls, tasks: Sequence[StageTask], rows: Sequence[Tensor]
    ) -> tuple["StageStreams", Tensor]:
        """Those of tasks that come from another stage, and their hidden states [r, h].

        Args:
            tasks: in the order of their rows.
            rows: what has come of each, [`num_sent`, h].
        """
        before = {
            place: own[task.num_rows :]
            for place, (task, own) in enumerate(zip(tasks, rows, strict=True))
            if task.compares
        }
        own_rows = [own[: task.num_rows] for task, own in zip(tasks, rows, strict=True)]
        return cls(tasks, before), torch.cat(own_rows)

    def at(self, hidden: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The residual stream of some tasks' last positions where hidden states [r, h] are, and at
        the exit before, each [n, h]."""
        return self.here(hidden, places), torch.cat([self._before[place] for place in places])

    def here(self, hidden: Tensor, places: Sequence[int]) -> Tensor:
        """The residual stream [n, h] of some tasks' last positions where hidden states [r, h]
        are."""
        return torch.cat([self._last_row(hidden, place) for place in places])

    def pass_exit(self, hidden: Tensor) -> None:
        """The next exit is behind the one at which hidden states [r, h] are."""
        for place in self._before:
            # The runner may write over it.
            self._before[place] = self._last_row(hidden, place).clone()

    def sent(self, hidden: Tensor, tasks: Sequence[StageTask]) -> Tensor:
        """What goes to the next stage with the tasks that are left: hidden states [r, h], and of
        each that still compares, behind its own, what it had at the exit before."""
        if not any(task.compares for task in tasks):
            return hidden
        parts = []
        for place, task in enumerate(tasks):
            end = self._ends[place]
            parts.append(hidden[end - task.num_rows : end])
            if task.compares:
                parts.append(self._before[place])
        return torch.cat(parts)

    def _last_row(self, hidden: Tensor, place: int) -> Tensor:
        end = self._ends[place]
        return hidden[end - 1 : end]
