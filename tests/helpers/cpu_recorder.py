"""Captures work such that a CPU can do it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

# Imported while PyTorch is patched, it would not know `is_compiling` again.
import torch._dynamo
from torch import Tensor

from megatron.early_exit.inference.model.recorder import Recorder
from megatron.early_exit.inference.model.segmented_model import SegmentedModel


class CpuRecorder:
    """See `Recorder`. What is replayed spoils the results of everything else: graphs share the
    memory for what they compute.

    Attributes:
        count: of what has been captured.
        replays: how often something has been done again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.replays = 0
        self._results: list[Tensor] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run some work; returns what does it again, and its result."""
        self.count += 1
        result = work()
        self._results.append(result)

        def replay() -> None:
            self.replays += 1
            for other in self._results:
                other.fill_(torch.nan)
            result.copy_(work())

        return replay, result


@contextmanager
def recorded_steps(recorder: Recorder) -> Iterator[None]:
    """Models that are made meanwhile with `compile_rows` capture their steps with a recorder, and
    their layers are run as they are written: no compiler puts them together."""
    with (
        patch("torch.compiler.is_compiling", lambda: True),
        patch("torch.compile", lambda function, **_: function),
        patch.object(SegmentedModel, "_new_recorder", lambda model: recorder),
    ):
        yield
