"""How long the passes of a rank take, measured without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Pass = Literal["forward", "backward"]


class PassClock:
    """Adds up the time of passes."""

    def __init__(self) -> None:
        self._seconds: dict[Pass, float] = {"forward": 0.0, "backward": 0.0}
        self._events: list[tuple[Pass, torch.cuda.Event, torch.cuda.Event]] = []
        self._on_device = torch.empty(0, device="cuda").is_cuda

    @contextmanager
    def time(self, kind: Pass) -> Iterator[None]:
        """Time what runs inside."""
        if self._on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[kind] += time.perf_counter() - begun

    def total_s(self) -> tuple[float, float]:
        """Seconds of all forward and of all backward passes; waits for the device."""
        for kind, begin, end in self._events:
            end.synchronize()
            self._seconds[kind] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds["forward"], self._seconds["backward"]
