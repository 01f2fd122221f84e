"""Scales the time limits of tests by the speed of this machine.

Time limits end tests that hang, and are written for a fast machine. A slow machine gets more time:
its speed is measured once, before the first test, and passed to all processes of a test run."""

from __future__ import annotations

import os
import time

VARIABLE = "EARLY_EXIT_TEST_PATIENCE"
"""Environment variable with the factor, for the processes that a test run starts."""
_FAST_S = 0.025
"""Seconds that `_work` takes on the machine for which limits are written."""
_MOST = 8.0
"""Largest factor by which limits are scaled, however slow the machine seems."""


def _work() -> float:
    start = time.perf_counter()
    total = 0
    for number in range(400_000):
        total += number * number % 7
    return time.perf_counter() - start


def measured_patience(rounds: int = 3) -> float:
    """The factor by which this machine is slower than the one for which limits are written, by the
    fastest of some rounds of plain Python; 1.0 to 8.0."""
    return min(_MOST, max(1.0, min(_work() for _ in range(rounds)) / _FAST_S))


def patience() -> float:
    """The factor of this test run; measured at the first call."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = f"{measured_patience():.2f}"
    return float(os.environ[VARIABLE])


def patient(seconds: float) -> float:
    """Convert a limit in seconds for a fast machine into one for this machine."""
    return seconds * patience()
