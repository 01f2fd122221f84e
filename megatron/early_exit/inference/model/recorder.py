"""Captures work on a GPU as CUDA graphs: whatever it launches is launched at once the next time.

A graph is replayed on the same memory, so its inputs are copied to where they were at its capture.
It is of one number of rows, so those of a step are rounded up to the next one that was captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows for which work is captured; with more of them, a step takes so long that
launching its kernels does not matter."""
_RUNS_BEFORE = 3
"""Of work that is captured: what it does only the first times must not be part of a graph."""


class Recorder(Protocol):
    """Captures work such that it can be done again."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run some work; returns what does it again, and where its result will be, which may have
        any shape. Other work that is done again may write over that."""
        ...


class CudaGraphRecorder:
    """Captures work on one device as CUDA graphs, whichever device is the current one.

    The graphs are replayed one after another, so they share the memory for what lies between.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture some work as a graph, after it has run a few times; its result may have any
        shape, see `Recorder`."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_RUNS_BEFORE):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = work()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay, result


@contextmanager
def preparation() -> Iterator[None]:
    """What is compiled or captured before the first request.

    Raises:
        ValueError: that is not possible on this machine.
    """
    try:
        yield
    except Exception as error:
        # Whatever goes wrong in there is of the machine, and many things can.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"compile is not possible here: {reason}") from error


def captured_count(count: int) -> int:
    """The number of rows that has been captured, for a step of `count` rows."""
    return 1 << (count - 1).bit_length()
