"""What earlier runs have found on the same kind of machine, and what has become worse since."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from figures import Figure

RECORDS = Path(__file__).resolve().parent / "records"
Change = Literal["better", "worse", "the same", "new", "not compared"]


def kind_of(machine: Mapping[str, Any], bf16_is_fast: bool) -> str:
    """The kind of a machine, whose figures are compared with each other: the GPU's name, or the
    CPU's instruction set and the number of its cores.

    Args:
        machine: as `megatron.early_exit.evaluation.provenance.machine` describes it.
        bf16_is_fast: as `megatron.early_exit.hardware.dtypes.dtype_speed` finds it.
    """
    if "gpu" in machine:
        return _slug(machine["gpu"])
    fast = "+bf16" if bf16_is_fast else ""
    return f"{_slug(machine['instruction_set'])}{fast}-{machine['cores']}-cores"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A benchmark that has been run.

    Attributes:
        name: in the catalogue.
        arguments: its flags.
        seconds: that it took.
        load: cores that something else kept busy meanwhile, on average.
        figures: what it has found.
        error: why it has no figures; empty if it has.
        date: on which it was run, as ISO 8601 has it.
    """

    name: str
    arguments: list[str]
    seconds: float
    load: float
    date: str
    figures: list[Figure] = field(default_factory=list)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The run as JSON values, with those of its figures."""
        return {**vars(self), "figures": [figure.as_dict() for figure in self.figures]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Run":
        """The run of which these are the JSON values; others are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"figures": [Figure.from_dict(one) for one in values["figures"]]})


@dataclass
class KindRecord:
    """The last recorded runs on a kind of machine.

    Attributes:
        kind: of machine.
        runs: by the benchmark's name, with the machine and the code of each.
    """

    kind: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, kind: str, folder: Path = RECORDS) -> "KindRecord":
        """The record of a kind, which is empty where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / f"{kind}.json"
        if not path.exists():
            return cls(kind)
        try:
            runs = dict(json.loads(path.read_text())["runs"])
            for values in runs.values():
                Run.from_dict(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of benchmarks: {error}") from error
        return cls(kind, runs)

    def run_like(self, name: str, arguments: Sequence[str]) -> Run | None:
        """The recorded run of a benchmark, if it had the same flags."""
        values = self.runs.get(name)
        if values is None or values["arguments"] != list(arguments):
            return None
        return Run.from_dict(values)

    def keep(self, run: Run, provenance: Mapping[str, Any]) -> None:
        """Replace the run of a benchmark."""
        self.runs[run.name] = {**run.as_dict(), **provenance}

    def save(self, folder: Path = RECORDS) -> Path:
        """Write the file; returns its path."""
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.kind}.json"
        record = {"kind": self.kind, "runs": dict(sorted(self.runs.items()))}
        path.write_text(json.dumps(record, indent=1) + "\n")
        return path


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure beside the same one of an earlier run.

    Attributes:
        figure: of this run.
        before: of the earlier one; None if there is none.
        change: what has become of it.
    """

    figure: Figure
    before: Figure | None
    change: Change


def compare(figures: Sequence[Figure], before: Sequence[Figure], margin: float) -> list[Comparison]:
    """Compare the figures of a benchmark with those of an earlier run of it.

    Args:
        figures: of this run.
        before: of the earlier one.
        margin: share of the earlier value by which a figure may differ and be the same.
    """
    earlier = {figure.key: figure for figure in before}
    return [_compared(figure, earlier.get(figure.key), margin) for figure in figures]


def _compared(figure: Figure, before: Figure | None, margin: float) -> Comparison:
    if figure.better is None:
        return Comparison(figure, before, "not compared")
    if before is None:
        return Comparison(figure, None, "new")
    room = margin * abs(before.value)
    gain = figure.value - before.value
    if figure.better == "lower":
        gain = -gain
    change: Change = "worse" if gain < -room else "better" if gain > room else "the same"
    return Comparison(figure, before, change)
