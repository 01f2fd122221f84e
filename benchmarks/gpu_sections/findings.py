"""What a section of the GPU check has found, and the table of all of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["holds", "MISSED", "measured", "not on a CPU", "needs two GPUs"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        found: what was observed, or why nothing could be.
        goal: what it has to be; empty where there is no goal.
        verdict: `holds` or `MISSED` where there is a goal, `measured` where there is none, else why
            it was not judged.
        values: the same as numbers, for the JSON file.
    """

    name: str
    found: str
    goal: str
    verdict: Verdict
    values: dict[str, Any]


@dataclass
class SectionReport:
    """What one section has found.

    Attributes:
        name: of the section.
        on_gpu: whether it runs on a GPU.
        file: gets the report again with each finding, so that what there is survives the process.
        error: why the section ended early; None if it did not.
    """

    name: str
    on_gpu: bool
    file: Path | None = None
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    def measure(self, name: str, found: str, **values: Any) -> None:
        """Record a figure that has no goal."""
        self._add(Finding(name, found, "", "measured", values))

    def check(
        self, name: str, found: str, goal: str, holds: bool, gpu_only: str = "", **values: Any
    ) -> None:
        """Record whether a goal was reached.

        Args:
            gpu_only: why a CPU cannot reach it or cannot miss it; with this, a CPU's figure is
                shown, but not judged.
        """
        if gpu_only and not self.on_gpu:
            self._add(Finding(name, f"{found} ({gpu_only})", goal, "not on a CPU", values))
        else:
            self._add(Finding(name, found, goal, "holds" if holds else "MISSED", values))

    def skip(self, name: str, reason: str, verdict: Verdict = "not on a CPU") -> None:
        """Record that something could not be looked at, and why."""
        self._add(Finding(name, reason, "", verdict, {}))

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.save()

    def save(self) -> None:
        """Write the report to its file, if it has one."""
        if self.file is not None:
            self.file.write_text(json.dumps(self.as_dict()))

    @property
    def has_failed(self) -> bool:
        """Whether a goal was missed, or the section could not be run to its end."""
        return self.error is not None or any(one.verdict == "MISSED" for one in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        findings = [
            {
                "name": one.name,
                "found": one.found,
                "goal": one.goal,
                "verdict": one.verdict,
                **one.values,
            }
            for one in self.findings
        ]
        return {"seconds": round(self.seconds, 1), "error": self.error, "findings": findings}

    def fill_from(self, file: Path) -> None:
        """Take over what the section's own process has written, if it has come to that."""
        if not file.exists() or not (text := file.read_text()):
            return
        record = json.loads(text)
        self.error = record["error"]
        for values in record["findings"]:
            name, found, goal, verdict = (
                values.pop(key) for key in ("name", "found", "goal", "verdict")
            )
            self.findings.append(Finding(name, found, goal, verdict, values))


def table(reports: Sequence[SectionReport]) -> str:
    """All findings, as text in columns; the error of a section is its last line."""
    rows = [("section", "line", "found", "goal", "")]
    for report in reports:
        rows += [(report.name, f.name, f.found, f.goal, f.verdict) for f in report.findings]
        if report.error is not None:
            rows.append((report.name, "the section itself", report.error, "", "ERROR"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
