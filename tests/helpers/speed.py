"""How patient tests are on this machine.

Time limits of tests are there to end what hangs, and are written down for a fast machine. A slow
one gets more time: it is measured once, before the first test, and all processes of a run are told
the result."""

from __future__ import annotations

import os
import time

VARIABLE = "EARLY_EXIT_TEST_PATIENCE"
"""Environment variable with the factor, for the processes that a test run starts."""
_FAST_S = 0.025
"""Seconds that `_work` takes on the machine that limits are written down for."""
_MOST = 8.0
"""Nothing is waited for longer than this many times, however slow the machine seems."""


def _work() -> float:
    start = time.perf_counter()
    total = 0
    for number in range(400_000):
        total += number * number % 7
    return time.perf_counter() - start


def measured_patience(rounds: int = 3) -> float:
    """The factor by which this machine is slower than the one that limits are written down for,
    by the fastest of some rounds of plain Python; 1.0 to 8.0."""
    return min(_MOST, max(1.0, min(_work() for _ in range(rounds)) / _FAST_S))


def patience() -> float:
    """The factor of this test run; measured at the first call."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = f"{measured_patience():.2f}"
    return float(os.environ[VARIABLE])


def patient(seconds: float) -> float:
    """A limit in seconds for this machine, from one for a fast machine."""
    return seconds * patience()
