"""The report of `run_all.py`: a table, the same as JSON, and a picture for each area."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalogue import Area, Benchmark
from figures import RATIO, Setting, interval, number
from matplotlib.figure import Figure as Picture
from run_records import Comparison, Run

from megatron.early_exit.evaluation.figures import save

_INK, _FAINT, _WRONG = "tab:blue", "0.55", "tab:red"
_BUSY = 0.1
"""The share of the cores that something else may keep busy: more of it disturbs a benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One benchmark in the report.

    Attributes:
        benchmark: of the catalogue.
        run: what was found; None if it has not been run yet.
        recorded: the earlier run that it is compared with, as JSON values, if there is one.
        comparisons: its figures beside the recorded ones.
    """

    benchmark: Benchmark
    run: Run | None
    recorded: Mapping[str, Any] | None
    comparisons: Sequence[Comparison]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that `run_all.py` has to say.

    Attributes:
        kind: of machine.
        provenance: the machine and the code, `machine` and `software`.
        margin: share by which a figure may differ from the recorded one.
        is_quick: the sizes are small, so that the figures mean little.
        entries: the benchmarks that were wanted, in the catalogue's order.
    """

    kind: str
    provenance: Mapping[str, Any]
    margin: float
    is_quick: bool
    entries: Sequence[Entry]

    @property
    def failed(self) -> list[str]:
        """Benchmarks that have no figures although they were run, and why."""
        runs = [entry.run for entry in self.entries if entry.run is not None]
        return [f"{run.name}: {run.error}" for run in runs if run.error]

    @property
    def worse(self) -> list[str]:
        """Figures that are worse than recorded ones by more than the margin."""
        return [
            f"{entry.benchmark.name}: {one.figure.name}, {said(one.figure.setting)}: "
            f"{number(one.before.value)} -> {number(one.figure.value)} {one.figure.unit}"
            for entry in self.entries
            for one in entry.comparisons
            if one.change == "worse" and one.before is not None
        ]

    @property
    def missed(self) -> int:
        """How many figures do not reach their bounds."""
        found = [one.figure for entry in self.entries for one in entry.comparisons]
        return sum(figure.passed is False for figure in found)

    @property
    def not_run(self) -> list[str]:
        """Benchmarks that were wanted, and have not been run yet."""
        return [entry.benchmark.name for entry in self.entries if entry.run is None]

    @property
    def troubles(self) -> dict[str, list[str]]:
        """What needs a look, by its kind."""
        return {
            "Worse than recorded": self.worse,
            "Failed": self.failed,
            "Not run yet": self.not_run,
        }

    def write(self, folder: Path) -> None:
        """Write `report.json`, `report.md` and a picture for each area into a folder."""
        (folder / "report.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        pictures = {}
        for area in dict.fromkeys(entry.benchmark.area for entry in self.entries):
            picture = draw(area, [one for one in self.entries if one.benchmark.area == area])
            if picture is not None:
                pictures[area] = f"{area}.svg"
                save(picture, folder / pictures[area])
        (folder / "report.md").write_text(self.as_markdown(pictures))

    def as_dict(self) -> dict[str, Any]:
        """The whole report as JSON values."""
        return {
            "kind": self.kind,
            **self.provenance,
            "margin": self.margin,
            "quick": self.is_quick,
            "worse": self.worse,
            "failed": self.failed,
            "not_run": self.not_run,
            "runs": [
                {
                    **entry.run.as_dict(),
                    "area": entry.benchmark.area,
                    "script": entry.benchmark.script,
                    "figures": [
                        {
                            **one.figure.as_dict(),
                            "recorded": None if one.before is None else one.before.value,
                            "change": one.change,
                        }
                        for one in entry.comparisons
                    ],
                }
                for entry in self.entries
                if entry.run is not None
            ],
        }

    def as_markdown(self, pictures: Mapping[Area, str]) -> str:
        """The tables, with links to the pictures of areas."""
        machine, software = self.provenance["machine"], self.provenance["software"]
        device = machine.get("gpu", machine["cpu"])
        lines = [
            "# Benchmarks",
            "",
            f"- kind of machine: {self.kind}",
            f"- device: {device}, {machine['cores']} cores, {machine['instruction_set']}, "
            f"{machine['threads']} threads",
            f"- commit: {software['commit']}",
            f"- lock: {software['lock']}",
            f"- compared with what was recorded on the same kind of machine, with a margin of "
            f"{self.margin:.0%}",
        ]
        if self.is_quick:
            lines.append("- a quick run, whose figures say only that everything runs")
        for title, found in self.troubles.items():
            if found:
                lines += ["", f"## {title}", "", *(f"- {one}" for one in found)]
        for area in dict.fromkeys(entry.benchmark.area for entry in self.entries):
            lines += ["", f"## {area.capitalize()}", ""]
            if area in pictures:
                lines += [f"![{area}]({pictures[area]})", ""]
            for entry in self.entries:
                if entry.benchmark.area == area and entry.run is not None:
                    lines += [*_table(entry, int(machine["cores"])), ""]
        return "\n".join(lines).rstrip() + "\n"


def _table(entry: Entry, cores: int) -> list[str]:
    run = entry.run
    assert run is not None
    command = " ".join(["python", f"benchmarks/{entry.benchmark.script}", *run.arguments])
    lines = [f"### {run.name}", "", f"`{command}`, {run.seconds / 60:.1f} minutes, {run.date}"]
    if run.load > _BUSY * cores:
        lines[-1] += f", beside other work ({run.load:.1f} cores)"
    if entry.recorded is not None:
        commit = entry.recorded["software"]["commit"]
        lines[-1] += f"; recorded on {entry.recorded['date']} at {commit}"
    if run.error:
        return [*lines, "", f"failed: {run.error}"]
    lines += [
        "",
        "| figure | setting | value | limit | bound | quartiles | recorded | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in entry.comparisons:
        figure, before = one.figure, one.before
        bound = ""
        if figure.bound is not None:
            bound = f"{'>=' if figure.better == 'higher' else '<='} {number(figure.bound)}"
            bound += "" if figure.passed else ": **missed**"
        cells = (
            figure.name,
            said(figure.setting),
            f"{number(figure.value)} {figure.unit}",
            "" if figure.limit is None else number(figure.limit),
            bound,
            "" if figure.spread is None else interval(figure.spread),
            "" if before is None else number(before.value),
            f"**{one.change}**" if one.change == "worse" else one.change,
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def said(setting: Setting) -> str:
    """A setting as people read it."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "no settings"


def draw(area: Area, entries: Sequence[Entry]) -> Picture | None:
    """Draw the ratios of an area with their limits, bounds and recorded values; None if there are
    none.

    Args:
        area: of all entries.
        entries: in this order, from top to bottom.
    """
    rows = [
        (entry.benchmark.name, one)
        for entry in entries
        for one in entry.comparisons
        if one.figure.unit == RATIO and one.figure.value > 0
    ]
    if not rows:
        return None
    picture = Picture(figsize=(9, 0.24 * len(rows) + 1.3), layout="constrained")
    axes = picture.add_subplot()
    for row, (_, one) in enumerate(rows):
        figure = one.figure
        is_wrong = one.change == "worse" or figure.passed is False
        colour = _WRONG if is_wrong else _INK
        if figure.spread is not None:
            axes.plot(figure.spread, (row, row), color=colour, linewidth=1.5)
        axes.plot(figure.value, row, marker="o", markersize=5, color=colour, linestyle="none")
        for value, marker in (
            (figure.limit, "|"),
            (figure.bound, ">" if figure.better == "higher" else "<"),
            (None if one.before is None else one.before.value, "x"),
        ):
            if value is not None and value > 0:
                axes.plot(value, row, marker=marker, color=_FAINT, linestyle="none", zorder=1)
    labels = [_label(name, one, rows) for name, one in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.axvline(1, color="0.85", linewidth=0.8, zorder=0)
    axes.set(title=area.capitalize())
    picture.supxlabel(
        "ratio: dots are measured, with quartiles; | limit, > or < bound, x recorded; "
        "red: bound missed, or worse",
        fontsize=8,
    )
    return picture


def _label(name: str, one: Comparison, rows: Sequence[tuple[str, Comparison]]) -> str:
    """The figure's name, with those of its settings that other figures of it have otherwise."""
    same = [other.figure.setting for _, other in rows if other.figure.name == one.figure.name]
    differing = {
        key: value
        for key, value in one.figure.setting.items()
        if any(setting.get(key) != value for setting in same)
    }
    text = f"{name}: {one.figure.name}"
    text += f" ({said(differing)})" if differing else ""
    # A sign that begins a formula.
    return text.replace("$", r"\$")
