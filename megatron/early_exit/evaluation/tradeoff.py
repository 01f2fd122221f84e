"""Points of a curve of quality against speed, and the table of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.evaluation.bootstrap import Interval, Sums, interval


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt's answer by a rule, beside the full model's.

    Attributes:
        decoded: tokens that are timed.
        seconds: that they took.
        full_decoded, full_seconds: the same of the full model's answer. What follows is of
            tokens that count for quality.
        exit_layers: number of layers behind the choice of each token.
        agrees: for each token, whether the full model would choose it after the same text.
        same: for each position of both answers, whether they have the same token.
        logprobs: of the tokens, by the full model.
    """

    decoded: int
    seconds: float
    full_decoded: int
    full_seconds: float
    exit_layers: Sequence[int]
    agrees: Sequence[bool]
    same: Sequence[bool]
    logprobs: Sequence[float]

    def sums(self) -> list[float]:
        """What the figures of a point are made of, added up over prompts."""
        return [
            *(self.decoded, self.seconds, self.full_decoded, self.full_seconds),
            *(sum(self.exit_layers), len(self.exit_layers)),
            *(sum(self.agrees), len(self.agrees), sum(self.same), len(self.same)),
            *(sum(self.logprobs), len(self.logprobs)),
        ]


@dataclass(frozen=True)
class Point:
    """Results for one threshold, relative to the full model, which is measured alternately.

    Attributes:
        curve: name of the curve that it belongs to.
        threshold: least confidence to leave at an exit; None is the full model.
        tokens_per_second: timed tokens by their seconds.
        speedup: against the curve's own full model.
        mean_exit_layer: number of layers run for a token, on average.
        agreement: share of tokens that the full model would choose after the same text.
        identical: share of positions at which the full model's own answer has the same token.
        perplexity: of the answers, by the full model.
        speedup_interval, agreement_interval, identical_interval: those in which the figures of 95 %
            of resampled sets of prompts are; None where that is not computed, or there are fewer
            than 2 prompts.
    """

    curve: str
    threshold: float | None
    tokens_per_second: float
    speedup: float
    mean_exit_layer: float
    agreement: float
    identical: float
    perplexity: float
    speedup_interval: Interval | None = None
    agreement_interval: Interval | None = None
    identical_interval: Interval | None = None


def point(
    curve: str, threshold: float | None, answers: Sequence[Answered], seed: int | None = None
) -> Point:
    """The point of a rule.

    Args:
        curve: its name.
        threshold: of the rule.
        answers: one for each prompt.
        seed: of the resampling for intervals; None leaves them out.
    """
    rows = np.array([one.sums() for one in answers], dtype=float)
    total = rows.sum(0, keepdims=True)
    intervals: dict[str, Interval | None] = {}
    if seed is not None:
        intervals = {
            "speedup_interval": interval(rows, _speedup, seed),
            "agreement_interval": interval(rows, _agreement, seed),
            "identical_interval": interval(rows, _identical, seed),
        }
    return Point(
        curve,
        threshold,
        float((total[:, 0] / total[:, 1])[0]),
        float(_speedup(total)[0]),
        float((total[:, 4] / total[:, 5])[0]),
        float(_agreement(total)[0]),
        float(_identical(total)[0]),
        math.exp(-float((total[:, 10] / total[:, 11])[0])),
        **intervals,
    )


def _speedup(sums: Sums) -> Sums:
    return (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])


def _agreement(sums: Sums) -> Sums:
    return sums[:, 6] / sums[:, 7]


def _identical(sums: Sums) -> Sums:
    return sums[:, 8] / sums[:, 9]


def fastest(points: Iterable[Point], least_agreement: float) -> Point:
    """The fastest of these points with at least that agreement. There is always one, because the
    full model agrees with itself."""
    return max((p for p in points if p.agreement >= least_agreement), key=lambda p: p.speedup)


def by_curve(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each curve."""
    found: dict[str, list[Point]] = {}
    for one in points:
        found.setdefault(one.curve, []).append(one)
    return found


def threshold_name(threshold: float) -> str:
    """A threshold with as many digits as it has, two or more behind the point."""
    return max(f"{threshold:.2f}", repr(threshold), key=len)


def table(points: Sequence[Point]) -> str:
    """The points as text: a line for each threshold, with the speeds of each curve. What is said of
    quality is the first curve's, so all should have the same."""
    columns = by_curve(points)
    first = "".join(f"{name:>22}" for name in columns)
    head = f"{'threshold':<10}" + f"{'tokens/s':>11} {'speed-up':>10}" * len(columns)
    rows = []
    for row in zip(*columns.values(), strict=True):
        speeds = "".join(f"{p.tokens_per_second:11.1f} {p.speedup:9.2f}x" for p in row)
        p = row[0]
        name = "full model" if p.threshold is None else threshold_name(p.threshold)
        rows.append(
            f"{name:>10}{speeds} {p.mean_exit_layer:10.1f} {p.agreement:10.1%} {p.identical:10.1%} "
            f"{p.perplexity:11.2f}"
        )
    head += f"{'exit layer':>11} {'agreement':>10} {'same text':>10} {'perplexity':>11}"
    return "\n".join([" " * 10 + first, head, *rows])
