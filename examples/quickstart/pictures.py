"""The demo's picture of its training."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot


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
