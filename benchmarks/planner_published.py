"""Compare the planner's predictions with published training runs.

    python benchmarks/planner_published.py [--runs FILE] [--picture FILE] [--json FILE]

Each row of the file is a run with its source (benchmarks/planner/published_runs.csv by default).
The table shows seconds of a step and gigabytes of memory, published and predicted. The command
fails if fewer than 31 of 34 steps (the same share of another file) are within 10 % of what was
published, if any is 15 % off, if their geometric standard deviation is above 5 %, or if a published
memory is 10 % off. A run that the planner cannot express is named, and counts as one that is not
within 10 %. --leave-one-out also shows what each source's rows give when the two shares of
the peak (a factor on both) are chosen by the other sources only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import fmean, pstdev

from figures import FigureTable, add_json_flag

from megatron.early_exit.errors import one_line
from megatron.early_exit.planner.published_runs import PublishedRun, read_runs

RUNS = Path(__file__).parent / "planner" / "published_runs.csv"
CLOSE, CLOSE_SHARE, FURTHEST, DEVIATION, MEMORY = 0.10, 31 / 34, 0.15, 0.05, 0.10
# Factors on the share of the peak, between which the ratios are interpolated.
_FACTORS = 0.95, 1.05


@dataclass(frozen=True)
class Comparison:
    """A run with what is predicted for it."""

    run: PublishedRun
    step_s: float
    peak_bytes: float

    @classmethod
    def of(cls, run: PublishedRun) -> Comparison:
        """A run beside what the planner expects of it."""
        prediction = run.predict()
        return cls(run, prediction.step_s, prediction.peak_bytes)

    @property
    def ratio(self) -> float:
        """Predicted over published step."""
        return self.step_s / self.run.step_s

    @property
    def memory_ratio(self) -> float | None:
        """Predicted over published memory, if that was published."""
        published = self.run.peak_bytes
        return None if published is None else self.peak_bytes / published


@dataclass(frozen=True)
class Verdict:
    """How good ratios are, and whether that is good enough."""

    num_rows: int
    num_close: int
    furthest: float
    deviation: float
    memory: float | None

    @classmethod
    def of(cls, ratios: Sequence[float], memory: Sequence[float], num_refused: int = 0) -> Verdict:
        """Judge ratios of steps and of memory, beside runs that are not modelled."""
        return cls(
            num_rows=len(ratios) + num_refused,
            num_close=sum(abs(ratio - 1) <= CLOSE for ratio in ratios),
            furthest=max(abs(ratio - 1) for ratio in ratios),
            deviation=exp(pstdev(map(log, ratios))) - 1,
            memory=max((abs(ratio - 1) for ratio in memory), default=None),
        )

    @property
    def holds(self) -> bool:
        """Whether all goals are reached."""
        return (
            self.num_close >= CLOSE_SHARE * self.num_rows - 1e-9
            and self.furthest <= FURTHEST
            and self.deviation <= DEVIATION
            and (self.memory is None or self.memory <= MEMORY)
        )

    def __str__(self) -> str:
        steps = (
            f"{self.num_close} of {self.num_rows} steps within {CLOSE:.0%} (at least "
            f"{CLOSE_SHARE:.1%}), furthest {self.furthest:.1%} (at most {FURTHEST:.0%}), geometric "
            f"standard deviation {self.deviation:.1%} (at most {DEVIATION:.0%})"
        )
        if self.memory is None:
            return steps
        return f"{steps}, memory {self.memory:.1%} off (at most {MEMORY:.0%})"


def table(rows: Sequence[Comparison]) -> str:
    """A line for each run, below its source."""
    width = max(len(row.run.name) for row in rows)
    has_memory = any(row.run.peak_bytes is not None for row in rows)
    columns = "  published  predicted  ratio" * (1 + has_memory)
    lines = [f"{'':{width}}{columns}"]
    source = ""
    for row in rows:
        if row.run.source != source:
            source = row.run.source
            lines.append(source)
        line = (
            f"{row.run.name:{width}} {row.run.step_s:8.3f} s {row.step_s:8.3f} s {row.ratio:6.3f}"
        )
        if row.run.peak_bytes is not None:
            line += f" {row.run.peak_bytes / 1e9:7.1f} GB {row.peak_bytes / 1e9:7.1f} GB"
            line += f" {row.memory_ratio:6.3f}"
        lines.append(line)
    return "\n".join(lines)


def leave_one_out(rows: Sequence[Comparison]) -> list[str]:
    """For each source: the factor on the share of the peak that is best for the other sources, and
    the ratios that its own rows have with it."""
    logs = [
        [log(Comparison.of(_with_share(row.run, factor)).ratio) for row in rows]
        for factor in _FACTORS
    ]
    lines = []
    span = log(_FACTORS[1] / _FACTORS[0])
    slopes = [(high - low) / span for low, high in zip(*logs, strict=True)]
    for source in dict.fromkeys(row.run.source for row in rows):
        others = [i for i, row in enumerate(rows) if row.run.source != source]
        if not others:
            continue
        at = [log(rows[i].ratio) for i in others]
        # Their mean is 1 there.
        shift = -fmean(at) / fmean(slopes[i] for i in others)
        own = [
            exp(log(row.ratio) + shift * slope)
            for row, slope in zip(rows, slopes, strict=True)
            if row.run.source == source
        ]
        lines.append(
            f"without {source[:40]}: factor {exp(shift):.3f}, its rows {min(own):.3f} to "
            f"{max(own):.3f}, mean {exp(fmean(map(log, own))):.3f}"
        )
    return lines


def _with_share(run: PublishedRun, factor: float) -> PublishedRun:
    share = run.accelerator.product_share * factor
    return replace(run, accelerator=replace(run.accelerator, product_share=share))


def draw(rows: Sequence[Comparison], path: Path) -> None:
    """Draw the ratios as a picture."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "published runs"
    figure, axes = plt.subplots(figsize=(7, 0.2 * len(rows) + 1.2), layout="constrained")
    axes.axvspan(1 - CLOSE, 1 + CLOSE, color="0.92")
    axes.axvline(1, color="0.6", linewidth=0.8)
    for source in dict.fromkeys(row.run.source for row in rows):
        own = [(row.ratio, i) for i, row in enumerate(rows) if row.run.source == source]
        ratios, positions = zip(*own, strict=True)
        axes.scatter(ratios, positions, s=18)
    axes.set_yticks(range(len(rows)), [row.run.name for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(1 - FURTHEST - 0.02, 1 + FURTHEST + 0.02)
    axes.set_xlabel("predicted over published time of a step (grey: within 10 %)")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def figures_of(verdict: Verdict) -> FigureTable:
    """What is bounded, as figures of which all have to reach their bounds."""
    table = FigureTable(runs=verdict.num_rows)
    share = verdict.num_close / verdict.num_rows
    # As in `Verdict.holds`, a share may be off by rounding.
    table.add(f"share of steps within {CLOSE:.0%}", share, CLOSE_SHARE - 1e-9, 1.0, unit="of all")
    for name, found, bound in (
        ("the furthest step is off by", verdict.furthest, FURTHEST),
        ("geometric standard deviation of the steps", verdict.deviation, DEVIATION),
        ("the furthest memory is off by", verdict.memory, MEMORY),
    ):
        if found is not None:
            table.add(name, found, bound, 0.0, unit="of it", better="lower")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="draw the ratios in this .svg or .png")
    parser.add_argument("--leave-one-out", action="store_true", help="see above; takes longer")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    try:
        if args.picture is not None and args.picture.suffix not in (".svg", ".png"):
            raise ValueError(f"--picture {args.picture}, allowed: .svg, .png")
        runs, refused = read_runs(args.runs)
        if not runs:
            raise ValueError(refused[0])
        rows = [Comparison.of(run) for run in runs]
        if args.picture is not None:
            draw(rows, args.picture)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    memory = [row.memory_ratio for row in rows if row.memory_ratio is not None]
    verdict = Verdict.of([row.ratio for row in rows], memory, len(refused))
    print("\n".join([table(rows), *refused]))
    if args.leave_one_out:
        print("\n".join(["", *leave_one_out(rows)]))
    print()
    status = figures_of(verdict).finish(args.json)
    print(f"\n{'reached' if verdict.holds else 'MISSED'}: {verdict}")
    return status


if __name__ == "__main__":
    sys.exit(main())
