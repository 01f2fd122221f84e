"""The form in which every benchmark says its figures, on the screen and in its file."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, Self

RATIO = "x"
"""The unit of a figure that is one thing measured over another in the same run."""
Better = Literal["higher", "lower"]
Setting = dict[str, str | int | float | bool]
_FEWEST_FOR_QUARTILES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: what was measured.
        value: the median, where it was measured several times.
        unit: "x" for a ratio.
        better: which values are better; None for a figure that only describes, which has no bound
            and is not compared with those of other runs.
        limit: the best value that is possible in theory, if that is known.
        bound: the worst value that is good enough, if there is one.
        spread: the quartiles of what was measured, if it was measured several times.
        setting: what it was measured with, such as a model or a batch size. No two figures of a
            benchmark have both the name and the setting in common.
        note: what else there is to say of it.

    Raises:
        ValueError: the value is no finite number, or there is a bound, and nothing is better.
    """

    name: str
    value: float
    unit: str = RATIO
    better: Better | None = "higher"
    limit: float | None = None
    bound: float | None = None
    spread: tuple[float, float] | None = None
    setting: Setting = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name}: {self.value} is no finite number")
        if self.bound is not None and self.better is None:
            raise ValueError(f"{self.name}: a figure with a bound is better higher or lower")

    @property
    def passed(self) -> bool | None:
        """Whether it reaches its bound; None where it has none."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.better == "higher" else self.value <= self.bound

    @property
    def key(self) -> str:
        """Name and setting, by which the same figure of another run is found."""
        return f"{self.name} {json.dumps(self.setting, sort_keys=True)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with the verdict."""
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The figure of which these are the JSON values."""
        known = {name: value for name, value in values.items() if name != "passed"}
        if known.get("spread") is not None:
            known["spread"] = tuple(known["spread"])
        return cls(**known)

    def __str__(self) -> str:
        parts = [f"{self.name:<46}{number(self.value):>8} {self.unit:<9}"]
        parts.append("" if self.limit is None else f"limit {number(self.limit)}")
        parts.append("" if self.spread is None else f"quartiles {interval(self.spread)}")
        if self.bound is not None:
            least = "at least" if self.better == "higher" else "at most"
            verdict = "yes" if self.passed else "NO"
            parts.append(f"{least} {number(self.bound)}: {verdict}")
        return "  ".join(part for part in (*parts, self.note) if part)


class FigureTable:
    """Prints the figures of a benchmark as they are found, and writes them to a file at the end.

    Attributes:
        figures: all of them so far.
        context: the setting of those that are added next.
    """

    def __init__(self, **context: str | int | float | bool) -> None:
        self.figures: list[Figure] = []
        self.context: Setting = context

    def add(
        self,
        name: str,
        values: float | Sequence[float],
        bound: float | None = None,
        limit: float | None = None,
        note: str = "",
        *,
        unit: str = RATIO,
        better: Better | None = "higher",
    ) -> None:
        """Print and keep a figure.

        Args:
            name, bound, limit, note, unit, better: of the figure.
            values: its value, or what each round has found, of which the median is the value.

        Raises:
            ValueError: there is such a figure already.
        """
        rounds = values if isinstance(values, Sequence) else [values]
        figure = Figure(
            name=name,
            value=median(rounds),
            unit=unit,
            better=better,
            limit=limit,
            bound=bound,
            spread=quartiles(rounds),
            setting=dict(self.context),
            note=note,
        )
        if any(one.key == figure.key for one in self.figures):
            raise ValueError(f"there are two figures {figure.key}")
        self.figures.append(figure)
        print(f"  {figure}", flush=True)

    def finish(self, path: Path | None, details: Mapping[str, Any] | None = None) -> int:
        """Write everything to a file, if one is wanted.

        Args:
            path: of the file; None writes none.
            details: what else was found, as JSON values.

        Returns:
            The exit status of the benchmark: 1 if a bound does not hold.
        """
        if path is not None:
            write_figures(path, self.figures, details)
        missed = sum(figure.passed is False for figure in self.figures)
        if missed:
            print(f"{missed} of the bounds do not hold", file=sys.stderr, flush=True)
        return int(missed > 0)


def write_figures(
    path: Path, figures: Sequence[Figure], details: Mapping[str, Any] | None = None
) -> None:
    """Write the file of a benchmark, with the machine and the code that the figures are of."""
    # Its imports take seconds, which most runs of small benchmarks do not need.
    import torch

    from megatron.early_exit.evaluation.provenance import machine, software

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "benchmark": Path(sys.argv[0]).stem,
        "machine": machine(device),
        "software": software(),
        "figures": [figure.as_dict() for figure in figures],
        "details": dict(details or {}),
    }
    written = path.with_name(f"{path.name}.part")
    written.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(written, path)


def read_figures(path: Path) -> list[Figure]:
    """The figures in the file of a benchmark.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return [Figure.from_dict(one) for one in json.loads(path.read_text())["figures"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no figures of a benchmark: {error}") from error


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Define the flag for the file of a benchmark's figures."""
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the figures here")


def writable(text: str) -> Path:
    """The path of a file that can be written; refused by `argparse` otherwise, before anything is
    measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, allowed: a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """First and third quartile; None of a single value."""
    if len(values) < _FEWEST_FOR_QUARTILES:
        return None
    low, _, high = quantiles(values, method="inclusive")
    return low, high


def number(value: float) -> str:
    """A number as text: whole ones and those from 100 on without decimals, those below 10 with
    three, others with one."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(spread: tuple[float, float]) -> str:
    """A range as text, such as `1.02 to 1.08`."""
    return f"{number(spread[0])} to {number(spread[1])}"


def ratios(times: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    """The ratio of two times in each round."""
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


def clock_text(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
