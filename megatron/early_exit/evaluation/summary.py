"""Figures made of records: a curve for each measure, cache policy and set of exits, and what each
exit is worth."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from megatron.early_exit.evaluation.bootstrap import Interval, Sums, interval
from megatron.early_exit.evaluation.calibration import ExitSummary, exit_summaries
from megatron.early_exit.evaluation.items import ALL
from megatron.early_exit.evaluation.outside_summary import OutsideSummary, outside_summary
from megatron.early_exit.evaluation.paired_test import Signs, holm, least_p_value, paired_p_value
from megatron.early_exit.evaluation.perplexity import perplexity
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import curve_name
from megatron.early_exit.evaluation.speed import Batch, batch_speed, seconds_of
from megatron.early_exit.evaluation.text_scores import CHOICE_SCORES
from megatron.early_exit.evaluation.tradeoff import Answered, Point, point
from megatron.early_exit.evaluation.units import OUTSIDE_KINDS


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over prompts, the full model's, and the interval of their difference.

    Attributes:
        value: of the rule, in the unit of the figure.
        full: of the full model, in the same unit.
        difference_interval: that which holds the difference in 95 % of resampled sets of prompts,
            each of which is compared with itself; None where there are fewer than 2.
        p_value: of the hypothesis that neither scores higher, see `paired_p_value`.
        adjusted_p_value: the same by Holm's correction (1979, see `holm`) for all rules that are
            tested on this task by this score; None for the full model.
        least_p_value: the smallest that so many prompts can have, see `least_p_value`.
        least_adjusted_p_value: the smallest that Holm's correction leaves of it for the first one
            of so many rules: where it is not small, no rule can be told from the full model.
        excluded: number of prompts that are in neither figure, since an exit cannot answer with
            one of their choices.
    """

    value: float
    full: float
    difference_interval: Interval | None
    p_value: float
    least_p_value: float
    adjusted_p_value: float | None = None
    least_adjusted_p_value: float | None = None
    excluded: int = 0


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
        exit_layers: those that the rule uses; None is all.
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
    exit_layers: tuple[int, ...] | None = None

    @property
    def curve(self) -> str:
        """The name of the curve that it is on."""
        return curve_name(self.measure, self.kv_policy, self.exit_layers)


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that was found.

    Attributes:
        outcomes: of all rules on all tasks together, then on each task; in each curve the full
            model comes first.
        exits: what each exit is worth, by measures.
        outside: how the full model compares with the outside baseline; None where that was not
            measured.
    """

    outcomes: Sequence[Outcome]
    exits: Sequence[ExitSummary]
    outside: OutsideSummary | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "outcomes": [asdict(one) for one in self.outcomes],
            "exits": [asdict(one) for one in self.exits],
            "outside": None if self.outside is None else asdict(self.outside),
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
    outside = [one for one in records if one["kind"] in OUTSIDE_KINDS.values()]
    full = {one["index"]: one for one in records if _is_full(one)}
    signs = Signs(seed)
    curves: dict[_Curve, dict[float, list[Record]]] = {}
    for one in records:
        if one["threshold"] is not None:
            exits = one["exits_asked"]
            key = _Curve(one["measure"], one["kv_policy"], None if exits is None else tuple(exits))
            curves.setdefault(key, {}).setdefault(one["threshold"], []).append(one)
    names = list(dict.fromkeys(tasks))
    outcomes: list[Outcome] = []
    for task in (ALL, *(names if len(names) > 1 else [])):
        own = {i for i, name in enumerate(tasks) if task in (ALL, name)}
        for curve, by_threshold in curves.items():
            maker = _Maker(task, curve, own, full, seed, signs)
            every = [one for records in by_threshold.values() for one in records]
            outcomes.append(maker.full_model(every))
            outcomes += [maker.rule(*one) for one in by_threshold.items()]
    return Summary(
        _adjusted(outcomes),
        exit_summaries(list(full.values())),
        outside_summary(outside, full, seed) if outside else None,
    )


def _is_full(record: Record) -> bool:
    return record["threshold"] is None and record["kind"] not in OUTSIDE_KINDS.values()


def _adjusted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same with p-values adjusted for all rules of a task and score."""
    families: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(outcomes):
        for name in one.scores:
            families.setdefault((one.task, name), []).append(place)
    scores = [dict(one.scores) for one in outcomes]
    for (_, name), every in families.items():
        places = [place for place in every if outcomes[place].threshold is not None]
        found = holm([scores[place][name].p_value for place in places])
        for place, value in zip(places, found, strict=True):
            scores[place][name] = replace(scores[place][name], adjusted_p_value=value)
        for place in every:
            own = scores[place][name]
            least = min(1.0, len(places) * own.least_p_value)
            scores[place][name] = replace(own, least_adjusted_p_value=least)
    return [replace(one, scores=own) for one, own in zip(outcomes, scores, strict=True)]


class _Curve(NamedTuple):
    measure: str
    kv_policy: str
    exit_layers: tuple[int, ...] | None


class _Maker:
    """Makes outcomes of a curve's rules on one task, and of the full model's beside them."""

    def __init__(
        self,
        task: str,
        curve: _Curve,
        prompts: Container[int],
        full: Mapping[int, Record],
        seed: int,
        signs: Signs,
    ) -> None:
        self._task, self._curve, self._seed, self._signs = task, curve, seed, signs
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
        found = quartiles = forced = forced_interval = None
        if answers:
            answered = [self._answered(one) for one in answers]
            found = point(curve_name(*self._curve), threshold, answered, self._seed)
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
            self._curve.measure,
            self._curve.kv_policy,
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
            batch_speed(batches, self._seed),
            self._curve.exit_layers,
        )

    def _answered(self, record: Record) -> Answered:
        timed, end = len(record["tokens"]), record["counted"]
        ends = sorted((end, self._full[record["index"]]["counted"]))
        # Behind the shorter text the longer one has tokens that are no longer the same.
        same = [*record["same"][: ends[0]], *[False] * (ends[1] - ends[0])]
        return Answered(
            timed,
            seconds_of(record),
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
            for name in CHOICE_SCORES
        }

    def _estimate(self, values: Sequence[float], full: Sequence[float]) -> Estimate:
        differences = [a - b for a, b in zip(values, full, strict=True)]
        return Estimate(
            float(np.mean(values)),
            float(np.mean(full)),
            interval(np.array([[one, 1.0] for one in differences]), _ratio, self._seed),
            paired_p_value(differences, self._signs),
            least_p_value(len(differences), {*values, *full} <= {0, 1}),
        )


def _ratio(sums: Sums) -> Sums:
    return sums[:, 0] / sums[:, 1]
