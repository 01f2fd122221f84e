"""Figures made of records: a curve for each measure and cache policy, and all exits."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import fmean, median
from typing import Any

import numpy as np

from megatron.early_exit.evaluation.bootstrap import Interval, Sums, interval
from megatron.early_exit.evaluation.calibration import ExitSummary, exit_summaries
from megatron.early_exit.evaluation.items import ALL
from megatron.early_exit.evaluation.perplexity import perplexity
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.tradeoff import Answered, Point, point


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over prompts, the full model's, and the interval of their difference.

    Attributes:
        value: of the rule.
        full: of the full model.
        difference_interval: that which holds the difference in 95 % of resampled sets of prompts,
            each of which is compared with itself; None where there are fewer than 2.
        excluded: number of prompts that are in neither figure, since an exit cannot answer with
            one of their choices.
    """

    value: float
    full: float
    difference_interval: Interval | None
    excluded: int = 0


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found of one rule on one task, or on all of them.

    Quality is that of answers up to where they end the text; what is behind counts for speed alone.

    Attributes:
        task: its name, or `ALL`.
        measure, kv_policy: of the rule; None for the full model.
        point: speed, and agreement in answers that go on freely; None where a task has choices
            alone.
        speedup_quartiles: of the prompts' own speed-ups.
        forced_agreement: share of the full model's own tokens that the rule chooses as well after
            the same text.
        forced_agreement_interval: by resampling prompts.
        held_out_perplexity: of prompts and references under the rule; None without references, or
            where an exit cannot answer with a token.
        scores: of answers compared with references, and `accuracy` of choices, by length
            `accuracy_norm`, which are missing where no prompt has one.
        exit_shares: share of the tokens that each number of layers has given.
        depths: mean number of layers at each place of an answer, over those that are so long.
        batch: None where no batches were measured, and for single tasks.
    """

    task: str
    measure: str | None
    kv_policy: str | None
    threshold: float | None
    point: Point | None
    speedup_quartiles: tuple[float, float, float] | None
    forced_agreement: float | None
    forced_agreement_interval: Interval | None
    held_out_perplexity: float | None
    scores: Mapping[str, Estimate]
    exit_shares: Mapping[int, float]
    depths: Sequence[float]
    batch: Batch | None

    @property
    def curve(self) -> str:
        """The name of the curve that it is on."""
        return f"{self.measure}, {self.kv_policy}"


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that was found.

    Attributes:
        outcomes: of all rules on all tasks together, then on each task; in each curve the full
            model comes first.
        exits: what each exit is worth, by measures.
    """

    outcomes: Sequence[Outcome]
    exits: Sequence[ExitSummary]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "outcomes": [asdict(one) for one in self.outcomes],
            "exits": [asdict(one) for one in self.exits],
        }

    def points(self, task: str = ALL) -> list[Point]:
        """The points of a task's curves."""
        return [o.point for o in self.outcomes if o.task == task and o.point is not None]


def summarize(records: Sequence[Record], tasks: Sequence[str], seed: int) -> Summary:
    """Make figures of the records of a whole measurement.

    Args:
        records: of all its units.
        tasks: the task of each prompt.
        seed: of the resampling.
    """
    full = {one["index"]: one for one in records if _is_full(one)}
    curves: dict[tuple[str, str], dict[float, list[Record]]] = {}
    for one in records:
        if not _is_full(one):
            curve = curves.setdefault((one["measure"], one["kv_policy"]), {})
            curve.setdefault(one["threshold"], []).append(one)
    names = list(dict.fromkeys(tasks))
    outcomes: list[Outcome] = []
    for task in (ALL, *(names if len(names) > 1 else [])):
        own = {i for i, name in enumerate(tasks) if task in (ALL, name)}
        for (measure, policy), by_threshold in curves.items():
            maker = _Maker(task, measure, policy, own, full, seed)
            every = [one for records in by_threshold.values() for one in records]
            outcomes.append(maker.full_model(every))
            outcomes += [maker.rule(*one) for one in by_threshold.items()]
    return Summary(outcomes, exit_summaries(list(full.values())))


def _is_full(record: Record) -> bool:
    return record["threshold"] is None


class _Maker:
    """Makes outcomes of a curve's rules on one task, and of the full model's beside them."""

    def __init__(
        self,
        task: str,
        measure: str,
        policy: str,
        prompts: Container[int],
        full: Mapping[int, Record],
        seed: int,
    ) -> None:
        self._task, self._measure, self._policy, self._seed = task, measure, policy, seed
        self._prompts, self._full = prompts, full

    def rule(self, threshold: float | None, records: Sequence[Record]) -> Outcome:
        """A rule, by its records."""
        own = [one for one in records if one["kind"] != "batch" and one["index"] in self._prompts]
        return self._outcome(
            threshold,
            [one for one in own if one["kind"] == "answer"],
            [one for one in own if one["kind"] == "choice"],
            [one for one in records if one["kind"] == "batch" and self._task == ALL],
        )

    def full_model(self, records: Sequence[Record]) -> Outcome:
        """The full model, as it was timed beside all rules of the curve."""
        timed: dict[tuple[str, int], Record] = {}
        for one in records:
            kind, index = one["kind"], one["index"]
            if (kind, index) not in timed:
                timed[kind, index] = {
                    **(one if kind == "batch" else self._full[index]),
                    "full_seconds": [],
                    "catch_up_seconds": [],
                }
            timed[kind, index]["full_seconds"] += one.get("full_seconds", [])
        for (kind, _), one in timed.items():
            one["seconds"] = one["full_seconds"]
            if kind == "answer":
                one["same"] = one["forced_agrees"] = [True] * len(one["tokens"])
        return self.rule(None, list(timed.values()))

    def _outcome(
        self,
        threshold: float | None,
        answers: Sequence[Record],
        choices: Sequence[Record],
        batches: Sequence[Record],
    ) -> Outcome:
        curve = f"{self._measure}, {self._policy}"
        found = quartiles = forced = forced_interval = None
        if answers:
            answered = [self._answered(one) for one in answers]
            found = point(curve, threshold, answered, self._seed)
            own = [one.full_seconds / one.seconds for one in answered]
            low, middle, high = np.quantile(own, [0.25, 0.5, 0.75])
            quartiles = (float(low), float(middle), float(high))
            ends = [self._full[one["index"]]["counted"] for one in answers]
            rows = np.array(
                [
                    [sum(one["forced_agrees"][:end]), end]
                    for one, end in zip(answers, ends, strict=True)
                ],
                dtype=float,
            )
            forced = float(rows[:, 0].sum() / rows[:, 1].sum())
            forced_interval = interval(rows, _ratio, self._seed)
        depths = [one["exit_layers"][: one["counted"]] for one in answers]
        layers = [layer for own in depths for layer in own]
        return Outcome(
            self._task,
            self._measure,
            self._policy,
            threshold,
            found,
            quartiles,
            forced,
            forced_interval,
            perplexity([one["held_out"] for one in answers]),
            {**self._scores(answers), **self._accuracies(choices)},
            {layer: layers.count(layer) / len(layers) for layer in sorted(set(layers))},
            [
                fmean(layer for layer in place if layer is not None)
                for place in zip_longest(*depths)
            ],
            self._batch(batches),
        )

    def _answered(self, record: Record) -> Answered:
        timed, end = len(record["tokens"]), record["counted"]
        ends = sorted((end, self._full[record["index"]]["counted"]))
        # Behind the shorter text the longer one has tokens that are no longer the same.
        same = [*record["same"][: ends[0]], *[False] * (ends[1] - ends[0])]
        return Answered(
            timed,
            _seconds(record),
            timed,
            median(record["full_seconds"]),
            record["exit_layers"][:end],
            record["agrees"][:end],
            same,
            record["logprobs"][:end],
        )

    def _scores(self, answers: Sequence[Record]) -> dict[str, Estimate]:
        compared = [one for one in answers if one["scores"]]
        names = compared[0]["scores"] if compared else ()
        return {
            name: self._estimate(
                [one["scores"][name] for one in compared],
                [self._full[one["index"]]["scores"][name] for one in compared],
            )
            for name in names
        }

    def _accuracies(self, choices: Sequence[Record]) -> dict[str, Estimate]:
        known = [one for one in choices if one["accuracy"] is not None]
        if not known:
            return {}
        return {
            name: replace(
                self._estimate(
                    [float(one[name]) for one in known],
                    [float(self._full[one["index"]][name]) for one in known],
                ),
                excluded=len(choices) - len(known),
            )
            for name in ("accuracy", "accuracy_norm")
        }

    def _estimate(self, values: Sequence[float], full: Sequence[float]) -> Estimate:
        differences = np.array([[a - b, 1.0] for a, b in zip(values, full, strict=True)])
        return Estimate(
            float(np.mean(values)),
            float(np.mean(full)),
            interval(differences, _ratio, self._seed),
        )

    def _batch(self, batches: Sequence[Record]) -> Batch | None:
        if not batches:
            return None
        rows = np.array([[o["tokens"], _seconds(o), median(o["full_seconds"])] for o in batches])
        total = rows.sum(0)
        return Batch(
            float(total[0] / total[1]),
            float(total[2] / total[1]),
            interval(rows, lambda sums: sums[:, 2] / sums[:, 1], self._seed),
        )


def _seconds(record: Record) -> float:
    """The time of an answer with what it has left undone."""
    return median(record["seconds"]) + median(record["catch_up_seconds"] or [0.0])


def _ratio(sums: Sums) -> Sums:
    return sums[:, 0] / sums[:, 1]
