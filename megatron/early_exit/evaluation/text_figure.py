"""A picture of one text, its tokens on the numbers of layers that gave them."""

from collections.abc import Sequence
from statistics import pvariance

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron.early_exit.evaluation.new_figure import new_figure
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import curve_name
from megatron.early_exit.evaluation.tradeoff import threshold_name

_LINE_LENGTH = 72
"""Characters of a line."""
_MOST_LINES = 40
"""Of a long answer the first ones are drawn: what is higher than a screen is no picture."""


def text_by_depth(records: Sequence[Record], num_layers: int) -> Figure | None:
    """Draw an answer's tokens on their numbers of layers, in lines; None where no prompt was
    continued. Of a long one they are the first tokens, which the title says.

    Of all answers by early exit it is the one whose depths vary most.

    Args:
        records: of all prompts.
        num_layers: of the model.
    """
    early = [one for one in records if one["kind"] == "answer" and one["threshold"] is not None]
    if not early:
        return None
    chosen = max(early, key=lambda one: pvariance(_depths_of(one)))
    cells = _cells(chosen["token_texts"][: chosen["counted"]])
    all_lines = cells[-1][0] + 1
    num_lines = min(all_lines, _MOST_LINES)
    cells = [one for one in cells if one[0] < num_lines]
    figure, axes = new_figure(7, 1.5 + 0.26 * num_lines)
    shades = matplotlib.colormaps["viridis"]
    for (line, column, text), layer in zip(cells, _depths_of(chosen), strict=False):
        shade = shades(layer / num_layers)
        axes.add_patch(
            Rectangle((column, line - 0.45), len(text) - 0.15, 0.9, facecolor=shade, linewidth=0)
        )
        # Grey levels as the eye weighs colours (Rec. 709).
        is_bright = (
            sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), shade[:3], strict=True)) > 0.5
        )
        axes.text(
            column + (len(text) - 0.15) / 2,
            line,
            text.replace("$", r"\$"),
            ha="center",
            va="center",
            family="monospace",
            fontsize=9,
            color="#000001" if is_bright else "white",
        )
    axes.set(xlim=(0, _LINE_LENGTH), ylim=(num_lines - 0.5, -0.5))
    axes.set_axis_off()
    name = curve_name(chosen["measure"], chosen["kv_policy"], chosen["exits_asked"])
    title = f"An answer by depth, {name}, threshold {threshold_name(chosen['threshold'])}"
    if all_lines > num_lines:
        title += f"\nits first {num_lines} of {all_lines} lines"
    axes.set_title(title)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, num_layers), shades), ax=axes, location="bottom", aspect=50
    )
    bar.set_ticks(sorted({0, num_layers, *_depths_of(chosen)}))
    bar.set_label("number of layers")
    return figure


def _depths_of(record: Record) -> list[int]:
    depths: list[int] = record["exit_layers"][: record["counted"]]
    return depths


def _cells(texts: Sequence[str]) -> list[tuple[int, int, str]]:
    """Line, column and visible text of each token, in lines of a limited length."""
    cells = []
    line = column = 0
    for text in texts:
        shown = (
            text.replace("\n", "\u21b5").replace("\t", "\u2192").replace(" ", "\u00b7") or "\u2205"
        )
        # A page must not have control characters, which random tokens are.
        shown = "".join(one if one.isprintable() else "\ufffd" for one in shown)[:_LINE_LENGTH]
        if column + len(shown) > _LINE_LENGTH:
            line, column = line + 1, 0
        cells.append((line, column, shown))
        column += len(shown)
    return cells
