"""Time limits of tests follow the speed of the machine."""

import os

import pytest

from tests.helpers import speed


@pytest.mark.parametrize(
    ("seconds", "factor"), [(0.01, 1.0), (0.025, 1.0), (0.05, 2.0), (0.1, 4.0), (60.0, 8.0)]
)
def test_a_slow_machine_is_waited_for_longer(monkeypatch, seconds, factor):
    times = iter([9 * seconds, seconds, 2 * seconds])
    monkeypatch.setattr(speed, "_work", lambda: next(times))
    assert speed.measured_patience() == pytest.approx(factor)


def test_the_machine_is_measured_once_in_a_run(monkeypatch):
    monkeypatch.delenv(speed.VARIABLE)
    monkeypatch.setattr(speed, "_work", lambda: 0.075)
    assert speed.patient(10) == pytest.approx(30)
    monkeypatch.setattr(speed, "_work", lambda: 1.0)
    assert speed.patient(10) == pytest.approx(30)


def test_pytest_timeout_was_told():
    assert float(os.environ["PYTEST_TIMEOUT"]) >= 300
