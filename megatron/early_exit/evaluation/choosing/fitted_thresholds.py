"""Thresholds of single exits, so that all of them agree with the full model equally often.

What a confidence is worth differs from exit to exit: 0.8 may mean 95 % agreement at a deep exit and
70 % at one in front. One threshold for all is then too strict here or too lax there.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron.early_exit.config import ExitMeasure
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.inference.modes.rule import ExitRule

_STEP = 1e-4
"""Thresholds are rounded up to multiples of this, so that they are short to write."""


def fitted_thresholds(
    answers: Sequence[Record], measure: ExitMeasure, exit_layers: Sequence[int], share: float
) -> tuple[float, ...]:
    """The least confidence for each exit, so that of the tokens that leave there the given share is
    the full model's.

    An exit is fitted to the positions that no exit in front of it has given.

    Args:
        answers: the full model's answers, as `Measurement` records them, with what each exit would
            have said of every token.
        measure: of confidence.
        exit_layers: the exits, in ascending order.
        share: of agreement, from 0 to 1.

    Returns:
        A threshold for each exit, from 0 to 1; 1 where no other has so much agreement.
    """
    staying = np.concatenate([np.full(one["counted"], True) for one in answers])
    found = []
    for layer in exit_layers:
        own = [(one["exits"][measure][str(layer)], one["counted"]) for one in answers]
        confidences = np.array([value for one, end in own for value in one["confidences"][:end]])
        agrees = np.array([value for one, end in own for value in one["agrees"][:end]], dtype=bool)
        threshold = least_threshold(confidences[staying], agrees[staying], share)
        rule = ExitRule((0,), (threshold,))
        staying &= [not rule.takes(0, float(one)) for one in confidences]
        found.append(threshold)
    return tuple(found)


def least_threshold(confidences: np.ndarray, agrees: np.ndarray, share: float) -> float:
    """The least threshold above which an exit agrees often enough.

    Args:
        confidences: of positions [n], from 0 to 1.
        agrees: whether the exit's best token is the full model's [n].
        share: of the positions at or above the threshold that have to agree.

    Returns:
        From 0 to 1; 1 where there is none.
    """
    order = np.argsort(-confidences, kind="stable")
    sorted_confidences = confidences[order]
    agreement = np.cumsum(agrees[order]) / np.arange(1, len(order) + 1)
    # Equal confidences leave together: what counts is the last one of them.
    is_last = np.append(np.diff(sorted_confidences) != 0, True)[: len(order)]
    enough = np.flatnonzero(is_last & (agreement >= share))
    if len(enough) == 0:
        return 1.0
    if enough[-1] == len(order) - 1:
        return 0.0
    return min(1.0, round(math.ceil(sorted_confidences[enough[-1]] / _STEP) * _STEP, 4))
