"""Pictures of what was found, for files and for the report."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron.early_exit.evaluation.items import ALL
from megatron.early_exit.evaluation.new_figure import new_figure
from megatron.early_exit.evaluation.summary import Outcome, Summary
from megatron.early_exit.evaluation.tradeoff import Point, by_curve, threshold_name

_LABEL_WIDTH, _LABEL_HEIGHT = 32, 14
"""Pixels that the name of a threshold needs at the figure's own 100 for an inch."""
_LONG_NAME = 22
_LEGEND_LINE = 0.21
"""Inches of a line of a legend."""
_LEGEND_COLUMNS = 4
_INK = "#010203"
"""Stands for the colour of a page's text, which no picture has otherwise."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a picture of the kind that the path's ending names."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element whose lines and letters have the colour of the page's text.

    Args:
        figure: the figure.
        name: of the figure, on which the names inside of the element depend.
    """
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK, which="both")
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    for legend in (*figure.legends, *(a.legend_ for a in figure.axes if a.legend_ is not None)):
        legend.get_frame().set_alpha(0)
        for text in legend.get_texts():
            text.set_color(_INK)
    for text in (text for axes in figure.axes for text in axes.texts):
        if text.get_color() == "black":
            text.set_color(_INK)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def figures_of(summary: Summary, num_layers: int) -> dict[str, Figure]:
    """All figures that can be drawn of a summary, by their names.

    Args:
        summary: what was found.
        num_layers: of the model.
    """
    found: dict[str, Figure] = {}
    whole = [one for one in summary.outcomes if one.task == ALL and one.point is not None]
    if not whole:
        return found
    outside = None if summary.outside is None else summary.outside.speedup
    found["quality_against_speed"] = tradeoff_curve(
        summary.points(), is_one_engine=True, outside=outside
    )
    curves: dict[str, list[Outcome]] = {}
    for one in whole:
        curves.setdefault(one.curve, []).append(one)
    first = next(iter(curves.values()))
    found["exits"] = _exit_histogram(first)
    found["calibration"] = _calibration(summary)
    found["depth_over_position"] = _depths(first, num_layers)
    tasks = {one.task for one in summary.outcomes if one.point is not None}
    if len(tasks) > 1:
        found["speedup_by_task"] = _speedup_by_task(summary, first[0].curve)
    return found


def tradeoff_curve(
    points: Sequence[Point],
    least_agreement: float | None = None,
    is_one_engine: bool = False,
    outside: float | None = None,
) -> Figure:
    """Draw agreement with the full model against speed, one mark for each threshold.

    Each speed is the point's speed-up over its own full model, beside which it was measured. Those
    of other engines are multiplied by how much faster the engine's full model is than the first
    one's. Bars are the points' intervals, where they have any.

    Args:
        points: of all curves; in each the full model comes first.
        least_agreement: a line marks it, so that a difference of a few tokens looks as small as it
            is; None draws none.
        is_one_engine: all curves have the same full model, whose speeds differ by chance alone.
        outside: speed of the outside baseline as a ratio to the full model's; None marks none.
    """
    # Each line of the legend takes as much from the axes.
    curves = by_curve(points)
    figure, axes = new_figure(7, 5 + _LEGEND_LINE * max(2 * len(curves) - 2, 0))
    first_speed = points[0].tokens_per_second
    marks: list[tuple[float, tuple[float, float]]] = []
    for name, own in curves.items():
        full, *early = own
        scale = 1.0 if is_one_engine else full.tokens_per_second / first_speed
        speeds = [scale * point.speedup for point in early]
        agreements = [100 * point.agreement for point in early]
        container = axes.errorbar(
            speeds,
            agreements,
            xerr=_bars([(p.speedup, p.speedup_interval) for p in early], scale),
            yerr=_bars([(p.agreement, p.agreement_interval) for p in early], 100),
            marker="o",
            elinewidth=0.6,
            label=f"early exit by threshold, {name}",
        )
        for point, x, y in zip(early, speeds, agreements, strict=True):
            assert point.threshold is not None
            marks.append((point.threshold, (x, y)))
        axes.plot(
            [scale],
            [100.0],
            marker="s",
            linestyle="none",
            color=container.lines[0].get_color(),
            label=f"full model, {name}",
        )
    if outside is not None:
        axes.plot(
            [outside],
            [100.0],
            marker="*",
            markersize=11,
            linestyle="none",
            color="gray",
            label="transformers, full model",
        )
    if least_agreement is not None:
        axes.axhline(100 * least_agreement, color="gray", linestyle="dashed", linewidth=1)
    axes.set(
        xlabel=f"speed, over the full model, {points[0].curve}",
        ylabel="agreement with the full model (%)",
        title="Quality against speed",
    )
    axes.margins(x=0.08)
    # Two long names do not fit beside each other.
    longest = max(len(one.curve) for one in points)
    figure.legend(loc="outside lower center", ncols=1 if longest > _LONG_NAME else 2)
    figure.draw_without_rendering()
    _label(axes, marks)
    return figure


def _bars(
    values: Sequence[tuple[float, tuple[float, float] | None]], scale: float
) -> list[list[float]] | None:
    """How far intervals reach below and above values, in units of a scale."""
    bars: list[list[float]] = [[], []]
    for value, bounds in values:
        if bounds is None:
            return None
        bars[0].append(max(0.0, scale * (value - bounds[0])))
        bars[1].append(max(0.0, scale * (bounds[1] - value)))
    return bars


def _label(axes: Axes, marks: Sequence[tuple[float, tuple[float, float]]]) -> None:
    """Label the marks with their thresholds, the lowest ones first, as far as there is room."""
    taken: list[tuple[float, float]] = []
    for threshold, place in sorted(marks):
        x, y = axes.transData.transform(place)
        if any(abs(x - a) < _LABEL_WIDTH and abs(y - b) < _LABEL_HEIGHT for a, b in taken):
            continue
        taken.append((x, y))
        name = threshold_name(threshold)
        axes.annotate(name, place, textcoords="offset points", xytext=(6, 4), fontsize=8)


def _exit_histogram(curve: Sequence[Outcome]) -> Figure:
    """Draw which share of the tokens each number of layers has given, for each threshold."""
    figure, axes = new_figure(7, 4.2)
    places = range(len(curve))
    layers = sorted({layer for one in curve for layer in one.exit_shares})
    below = np.zeros(len(curve))
    for layer in layers:
        shares = np.array([100 * one.exit_shares.get(layer, 0.0) for one in curve])
        axes.bar(places, shares, bottom=below, label=f"layer {layer}")
        below += shares
    axes.set(xlabel="threshold", ylabel="tokens (%)", title=f"Exits, {curve[0].curve}")
    axes.set_xticks(places, [_name(one) for one in curve], rotation=90)
    figure.legend(loc="outside lower center", ncols=min(len(layers), _LEGEND_COLUMNS))
    return figure


def _calibration(summary: Summary) -> Figure:
    """Draw how often each exit agrees with the full model where it is so sure."""
    figure, axes = new_figure(7, 5)
    axes.plot([0, 100], [0, 100], color="gray", linestyle="dashed", linewidth=1)
    for one in summary.exits:
        axes.plot(
            [100 * bin.mean_confidence for bin in one.bins],
            [100 * bin.agreement for bin in one.bins],
            marker="o",
            label=f"{one.measure}, exit after layer {one.layer}",
        )
    axes.set(
        xlabel="mean confidence (%)",
        ylabel="agreement with the full model (%)",
        title="Calibration of the exits",
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _depths(curve: Sequence[Outcome], num_layers: int) -> Figure:
    """Draw the mean number of layers at each place of the answers, a row for each threshold."""
    figure, axes = new_figure(7, 4.2)
    longest = max(len(one.depths) for one in curve)
    # Where no answer of a rule is so long, its row is empty.
    rows = [[*one.depths, *[math.nan] * (longest - len(one.depths))] for one in curve]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=num_layers)
    axes.set_yticks(range(len(curve)), [_name(one) for one in curve], fontsize=7)
    axes.set(
        xlabel="place in the answer (tokens)",
        ylabel="threshold",
        title=f"Depth over position, {curve[0].curve}",
    )
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("mean number of layers")
    return figure


def _speedup_by_task(summary: Summary, curve: str) -> Figure:
    """Draw the speed-up of each kind of text by threshold."""
    figure, axes = new_figure(7, 4.2)
    tasks: dict[str, list[tuple[float, float]]] = {}
    for one in summary.outcomes:
        if one.curve == curve and one.point is not None and one.threshold is not None:
            tasks.setdefault(one.task, []).append((one.threshold, one.point.speedup))
    for task, marks in tasks.items():
        # A file's name may have a sign that begins a formula, or one that hides a label.
        label = "all tasks" if task == ALL else "task " + task.replace("$", r"\$")
        axes.plot(*zip(*marks, strict=True), marker=".", label=label)
    axes.axhline(1, color="gray", linestyle="dashed", linewidth=1)
    axes.set(
        xlabel="threshold",
        ylabel="speed-up over the full model",
        title=f"Speed-up by task, {curve}",
    )
    figure.legend(loc="outside lower center", ncols=min(len(tasks), _LEGEND_COLUMNS))
    return figure


def _name(outcome: Outcome) -> str:
    return "full" if outcome.threshold is None else threshold_name(outcome.threshold)


PICTURES: Mapping[str, str] = {
    "quality_against_speed": "Agreement with the full model against speed. Each mark is a "
    "threshold; bars hold 95 % of resampled sets of prompts; squares are the full model. "
    "The star, where there is one, is transformers with the same weights.",
    "exits": "The share of tokens that each exit, or the final head, has given.",
    "calibration": "Where an exit is so sure, how often is its token the full model's? On the "
    "dashed line confidence is what it seems to be.",
    "depth_over_position": "The mean number of layers at each place of the answers.",
    "speedup_by_task": "Some kinds of text are easier than others.",
    "text_by_depth": "One answer, each of its tokens on the number of layers that gave it. Below, "
    "all texts can be clicked through.",
}
"""What the figures show, by their names."""
