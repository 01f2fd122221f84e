"""What each exit is worth: whether its confidence tells how often it agrees with the full model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.evaluation.perplexity import perplexity
from megatron.early_exit.evaluation.records import Record

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions at which an exit has confidences in a tenth of the range from 0 to 1.

    Attributes:
        low, high: of the range, as confidences from 0 to 1; the upper end is in the last one only.
        count: number of positions.
        mean_confidence: of them.
        agreement: share at which the exit's best token is the full model's.
    """

    low: float
    high: float
    count: int
    mean_confidence: float
    agreement: float


@dataclass(frozen=True, slots=True)
class ExitSummary:
    """An exit, on the full model's own answers up to the end of the text.

    Attributes:
        measure: of confidence.
        layer: number of layers before the exit.
        agreement: share of all positions at which its best token is the full model's.
        held_out_perplexity: of prompts and references by this exit alone; None as in `Outcome`.
        calibration_error: mean distance of confidence and agreement of the bins, weighted by their
            positions (expected calibration error, arXiv 1706.04599).
        bins: those that have positions.
    """

    measure: str
    layer: int
    agreement: float
    held_out_perplexity: float | None
    calibration_error: float
    bins: Sequence[Bin]


def exit_summaries(full: Sequence[Record]) -> list[ExitSummary]:
    """Summaries of all exits by all measures.

    Args:
        full: the full model's records.
    """
    answers = [one for one in full if one["kind"] == "answer"]
    if not answers:
        return []
    return [
        _summary(answers, measure, layer)
        for measure, exits in answers[0]["exits"].items()
        for layer in exits
    ]


def _summary(answers: Sequence[Record], measure: str, layer: str) -> ExitSummary:
    own = [(one["exits"][measure][layer], one["counted"]) for one in answers]
    confidences = np.array([value for one, end in own for value in one["confidences"][:end]])
    agrees = np.array([value for one, end in own for value in one["agrees"][:end]], dtype=float)
    bins = calibration_bins(confidences, agrees)
    error = sum(one.count * abs(one.mean_confidence - one.agreement) for one in bins)
    return ExitSummary(
        measure,
        int(layer),
        float(agrees.mean()),
        perplexity([one["exits_held_out"][layer] for one in answers]),
        error / len(agrees),
        bins,
    )


def calibration_bins(confidences: np.ndarray, agrees: np.ndarray) -> list[Bin]:
    """The positions [n] in bins by their confidences [n], as far as bins have any.

    Args:
        confidences: from 0 to 1.
        agrees: 1 where the exit agrees with the full model, else 0.
    """
    edges = np.linspace(0, 1, NUM_BINS + 1)
    numbers = np.clip(np.digitize(confidences, edges) - 1, 0, NUM_BINS - 1)
    return [
        Bin(
            float(edges[number]),
            float(edges[number + 1]),
            int((numbers == number).sum()),
            float(confidences[numbers == number].mean()),
            float(agrees[numbers == number].mean()),
        )
        for number in np.unique(numbers)
    ]
