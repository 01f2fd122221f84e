"""The demo's pictures: losses over training, and quality against speed."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from examples.quickstart.tradeoff import Point, by_curve

_LABEL_WIDTH, _LABEL_HEIGHT = 32, 14
"""Pixels that the name of a threshold needs at the figure's own 100 for an inch."""


def loss_curves(tensorboard: Path, picture: Path) -> None:
    """Draw the loss of the final head and of each exit from a run's event files."""
    events = EventAccumulator(str(tensorboard))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.endswith("loss")]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for tag in sorted(tags, key=lambda tag: (tag == "lm loss", tag)):
        scalars = events.Scalars(tag)
        label = (
            "final head"
            if tag == "lm loss"
            else tag.removesuffix(" loss").replace(" ", " after layer ")
        )
        axes.plot([one.step for one in scalars], _smooth([x.value for x in scalars]), label=label)
    axes.set(
        xlabel="step", ylabel="cross entropy (nats per token), smoothed", title="Training losses"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Running mean with exponentially falling weights, without a bias at the start."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def tradeoff_curve(points: Sequence[Point], picture: Path, least_agreement: float) -> None:
    """Draw agreement with the full model against speed, one mark for each threshold.

    All speeds are relative to the first point's, which is a full model's. A line marks the required
    agreement, so that a difference of a few tokens looks as small as it is.
    """
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    slowest = points[0].tokens_per_second
    marks: list[tuple[str, tuple[float, float]]] = []
    for name, own in by_curve(points).items():
        full, *early = own
        speeds = [point.tokens_per_second / slowest for point in early]
        agreements = [100 * point.agreement for point in early]
        (line,) = axes.plot(
            speeds, agreements, marker="o", label=f"early exit by threshold, {name}"
        )
        names = [f"{point.threshold:.2f}" for point in early]
        marks += zip(names, zip(speeds, agreements, strict=True), strict=True)
        axes.plot(
            [full.tokens_per_second / slowest],
            [100.0],
            marker="s",
            linestyle="none",
            color=line.get_color(),
            label=f"full model, {name}",
        )
    axes.axhline(100 * least_agreement, color="gray", linestyle="dashed", linewidth=1)
    axes.set(
        xlabel=f"speed, over the full model, {points[0].curve}",
        ylabel="tokens that the full model would choose (%)",
        title="Quality against speed",
    )
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(by_curve(points)))
    figure.draw_without_rendering()
    _label(axes, marks)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _label(axes: Axes, marks: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Label the marks with their thresholds, the lowest ones first, as far as there is room."""
    taken: list[tuple[float, float]] = []
    for name, place in sorted(marks):
        x, y = axes.transData.transform(place)
        if any(abs(x - a) < _LABEL_WIDTH and abs(y - b) < _LABEL_HEIGHT for a, b in taken):
            continue
        taken.append((x, y))
        axes.annotate(name, place, textcoords="offset points", xytext=(6, 4), fontsize=8)
