"""Times in records, and speeds made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from megatron.early_exit.evaluation.bootstrap import Interval, Sums, interval
from megatron.early_exit.evaluation.records import Record


@dataclass(frozen=True, slots=True)
class Batch:
    """The speed of several prompts together, prefill included.

    Attributes:
        tokens_per_second: of all of them.
        speedup: against the full model in the same batches.
        speedup_interval: by resampling batches; None where there are fewer than 2.
    """

    tokens_per_second: float
    speedup: float
    speedup_interval: Interval | None


def batch_speed(batches: Sequence[Record], seed: int) -> Batch | None:
    """The speed of batches; None where there are none.

    Args:
        batches: their records.
        seed: of the resampling.
    """
    if not batches:
        return None
    rows = np.array([[o["tokens"], seconds_of(o), median(o["full_seconds"])] for o in batches])
    total = rows.sum(0)
    return Batch(
        float(total[0] / total[1]),
        float(total[2] / total[1]),
        interval(rows, speedup_of, seed),
    )


def speedup_of(sums: Sums) -> Sums:
    """Speed-ups of sums of tokens, seconds, and the full model's seconds [r, 3]."""
    return sums[:, 2] / sums[:, 1]


def seconds_of(record: Record) -> float:
    """The time of an answer with what it has left undone."""
    return median(record["seconds"]) + median(record["catch_up_seconds"] or [0.0])
