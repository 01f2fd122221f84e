"""The reports of the parts of `soak.py`: promises, figures and progress."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from figures import clock_text

_TELL_S = 10.0


@dataclass(frozen=True)
class Promise:
    """One promise that is tested.

    Attributes:
        text: the promise.
        found: the observation.
        holds: whether it was kept; None if the run was too short to say.
    """

    text: str
    found: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """The verdict in a word or two."""
        return {True: "holds", False: "BROKEN", None: "not judged"}[self.holds]


@dataclass
class PartResult:
    """The results of one part."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)
    seconds: float = 0.0

    def promise(self, text: str, found: object, holds: bool | None) -> None:
        """Record a promise, what was found, and whether it holds (None: not judged)."""
        self.promises.append(Promise(text, str(found), holds))

    @property
    def broken(self) -> list[str]:
        """Promises that do not hold."""
        return [one.text for one in self.promises if one.holds is False]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        promises = [
            {"promise": one.text, "found": one.found, "verdict": one.verdict}
            for one in self.promises
        ]
        return {"seconds": round(self.seconds, 1), "promises": promises, **self.figures}


class ProgressLine:
    """Prints a line now and then with the progress of a part and the time left.

    Args:
        name: of the part.
        total: of what it counts: requests, kills, seconds.
        unit: of the total.
    """

    def __init__(self, name: str, total: float, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._begin = time.monotonic()
        self._told = self._begin

    def tell(self, done: float, note: str = "", always: bool = False) -> None:
        """Print where it is, if the last line is old enough."""
        now = time.monotonic()
        if not always and now - self._told < _TELL_S:
            return
        self._told = now
        line = f"{self._name}: {done:,.0f} of {self._total:,.0f} {self._unit}"
        if 0 < done <= self._total:
            left = (now - self._begin) * (self._total / done - 1)
            line += f", {clock_text(left)} left"
        print(f"{line}{', ' if note else ''}{note}", file=sys.stderr, flush=True)


def table(reports: list[PartResult]) -> str:
    """All promises, as text in columns."""
    rows = [("part", "promise", "found", "")]
    rows += [(one.name, p.text, p.found, p.verdict) for one in reports for p in one.promises]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
