"""How the full model compares with the outside baseline: the same texts, and how fast."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from megatron.early_exit.evaluation.bootstrap import Interval, interval
from megatron.early_exit.evaluation.perplexity import perplexity
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.speed import Batch, batch_speed, speedup_of
from megatron.early_exit.evaluation.units import OUTSIDE_KINDS


@dataclass(frozen=True, slots=True)
class Both:
    """A figure of the full model, and of the baseline on the same prompts.

    Attributes:
        full: of the full model, in the unit of the figure, see `OutsideSummary`.
        outside: of the baseline, in the same unit.
    """

    full: float
    outside: float


@dataclass(frozen=True, slots=True)
class OutsideSummary:
    """What was found of the baseline beside the engine's full model.

    Quality is that of the full model's answers up to where they end the text, as that of rules is;
    what is behind counts for speed alone.

    Attributes:
        answers: number of prompts that both have continued.
        equal_answers: number of answers that have the same tokens up to there.
        agreement: share of the full model's own tokens that the baseline would choose after the
            same text; None without answers, as are the following.
        answer_perplexity: of the full model's answers, by both.
        held_out_perplexity: of prompts and references; None without references.
        accuracy: of choices, from 0 to 1; None where no prompt has any.
        tokens_per_second: of both, single prompts, by the wall clock, from the tokens of the prompt
            to the text of the answer.
        speedup: the baseline's speed over that of the full model, in turns with which it was
            measured.
        speedup_interval: by resampling prompts; None where there are fewer than 2.
        batch: None where no batches were measured.
        left_out: number of records that the baseline does not have, since it could not be measured
            any more.
        reason: why; None where it has all.
    """

    answers: int
    equal_answers: int
    agreement: float | None
    answer_perplexity: Both | None
    held_out_perplexity: Both | None
    accuracy: Both | None
    tokens_per_second: Both | None
    speedup: float | None
    speedup_interval: Interval | None
    batch: Batch | None
    left_out: int = 0
    reason: str | None = None

    def sentence(self) -> str:
        """Whether both are the same model, as a reader wants to know it."""
        parts = []
        if self.answers:
            parts.append(f"texts equal {self.equal_answers} of {self.answers}")
        if self.agreement is not None:
            parts.append(f"tokens after the same text equal {self.agreement:.2%}")
        for name, both in (
            ("perplexity of answers", self.answer_perplexity),
            ("of held-out text", self.held_out_perplexity),
            ("accuracy", self.accuracy),
        ):
            if both is not None:
                parts.append(f"{name} {both.full:.4f} and {both.outside:.4f}")
        told = [f"full model and transformers: {', '.join(parts)}"] if parts else []
        if self.reason is not None:
            units = "answer or score" if self.left_out == 1 else "answers or scores"
            told.append(
                f"transformers is left out of {self.left_out} {units} ({self.reason.rstrip('.')})"
            )
        return "; ".join(told) or "full model and transformers: nothing that both could score"


def outside_summary(
    records: Sequence[Record], full: Mapping[int, Record], seed: int
) -> OutsideSummary:
    """Summarise the baseline's records.

    Args:
        records: all of them.
        full: the full model's own, by the indices of prompts.
        seed: of the resampling.
    """
    measured = [one for one in records if "left_out" not in one]
    reasons = [one["left_out"] for one in records if "left_out" in one]
    by_kind = {
        kind: [one for one in measured if one["kind"] == own] for kind, own in OUTSIDE_KINDS.items()
    }
    answers = by_kind["answer"]
    pairs = [(full[one["index"]], one) for one in answers]
    rows = np.array(
        [[len(o["tokens"]), median(o["seconds"]), median(o["full_seconds"])] for o in answers]
    ).reshape(-1, 3)
    tokens, seconds, full_seconds = rows.sum(0).tolist()
    ends = [own["counted"] for own, _ in pairs]
    agrees = [
        a == b
        for (own, one), end in zip(pairs, ends, strict=True)
        for a, b in zip(own["tokens"][:end], one["choices"][:end], strict=True)
    ]
    return OutsideSummary(
        answers=len(answers),
        equal_answers=sum(all(one["same"][:end]) for one, end in zip(answers, ends, strict=True)),
        agreement=fmean(agrees) if agrees else None,
        answer_perplexity=_both(
            _of_logprobs([pair[0]["logprobs"] for pair in pairs], ends),
            _of_logprobs([pair[1]["logprobs"] for pair in pairs], ends),
        ),
        held_out_perplexity=_both(
            perplexity([one["held_out"] for one, _ in pairs]),
            perplexity([one["held_out"] for _, one in pairs]),
        ),
        accuracy=_accuracy([(full[one["index"]], one) for one in by_kind["choice"]]),
        tokens_per_second=Both(tokens / full_seconds, tokens / seconds) if answers else None,
        speedup=full_seconds / seconds if answers else None,
        speedup_interval=interval(rows, speedup_of, seed) if answers else None,
        batch=batch_speed(by_kind["batch"], seed),
        left_out=len(reasons),
        reason=reasons[0] if reasons else None,
    )


def _both(full: float | None, outside: float | None) -> Both | None:
    return None if full is None or outside is None else Both(full, outside)


def _of_logprobs(answers: Sequence[Sequence[float]], ends: Sequence[int]) -> float | None:
    """The perplexity of answers, each up to its end."""
    every = [value for one, end in zip(answers, ends, strict=True) for value in one[:end]]
    return math.exp(-fmean(every)) if every else None


def _accuracy(pairs: Sequence[tuple[Record, Record]]) -> Both | None:
    known = [
        (float(a["accuracy"]), float(b["accuracy"]))
        for a, b in pairs
        if None not in (a["accuracy"], b["accuracy"])
    ]
    return Both(*map(fmean, zip(*known, strict=True))) if known else None
