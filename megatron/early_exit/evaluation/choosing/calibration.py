"""Tests rules on texts until no further one can be proven, and finds out how fast proven ones are.

Everything that is measured is in a file of records, from which a killed calibration goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from megatron.early_exit.evaluation.choosing.fixed_sequence import level_of_path, num_proven
from megatron.early_exit.evaluation.choosing.needed import texts_needed
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value
from megatron.early_exit.evaluation.choosing.paths import RulePath
from megatron.early_exit.evaluation.choosing.wish import AGREEMENT, Requirement
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.recording import Recording
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.summary import summarize
from megatron.early_exit.evaluation.tradeoff import Point
from megatron.early_exit.evaluation.units import Unit


@dataclass(frozen=True, slots=True)
class Loss:
    """What a rule has lost on one task.

    Attributes:
        task, name: of the requirement.
        limit: of the requirement, what a text may be expected to lose, above 0 and below 1.
        mean: over the texts that were measured, from 0 to 1.
        texts: number of those texts; fewer than there are where further ones could not have proven
            the rule.
        needed: a number of texts that would prove a rule with this loss; None where none would.
    """

    task: str
    name: str
    limit: float
    mean: float
    texts: int
    needed: int | None


@dataclass(frozen=True, slots=True)
class Tested:
    """A rule that was tested.

    Attributes:
        rule: what was tested.
        p_value: the largest one of all requirements; where `is_cut`, it would be at least this.
        is_proven: so are it and all rules in front of it on its path.
        is_cut: texts are left that were not measured, since they could not have proven the rule.
        losses: one for each requirement.
    """

    rule: Rule
    p_value: float
    is_proven: bool
    is_cut: bool
    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True)
class Gain:
    """What a proven rule gains, on a few of the texts.

    Attributes:
        mean_exit_layer: number of layers behind a token, on average.
        speedup: against the full model; None where no times were measured.
        speedup_interval: by resampling texts.
    """

    mean_exit_layer: float
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None


@dataclass
class Calibration:
    """Proves rules by texts.

    Args:
        recording: of a measurement of the texts, and behind them of other prompts.
        requirements: what is to be proven of a rule.
        paths: the rules.
        confidence: of the promise.
        num_texts: how many of the recording's prompts are texts that prove.
        bar: shows how far the work is, in texts.
    """

    recording: Recording
    requirements: Sequence[Requirement]
    paths: Sequence[RulePath]
    confidence: float
    num_texts: int
    bar: "tqdm[Any]"
    _full: dict[int, Record] = field(default_factory=dict, init=False)
    _own: dict[int, list[Requirement]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for one in self.requirements:
            for index in one.indices:
                self._own.setdefault(index, []).append(one)

    @property
    def level(self) -> float:
        """The largest p-value that proves a rule."""
        return level_of_path(self.confidence, len(self.paths))

    def test(self, path: RulePath) -> list[Tested]:
        """Test rules of a path, until one is not proven.

        Raises:
            FloatingPointError: logits are not finite.
            OSError: the records cannot be written.
        """
        tried: list[Tested] = []

        def p_values() -> Iterator[float]:
            for rule in path.rules:
                tried.append(self._try(rule))
                yield tried[-1].p_value

        count = num_proven(p_values(), self.level)
        self._skip((len(path.rules) - len(tried)) * self.num_texts)
        return [replace(one, is_proven=place < count) for place, one in enumerate(tried)]

    def _try(self, rule: Rule) -> Tested:
        values: dict[Requirement, list[float]] = {one: [] for one in self.requirements}
        measured = 0
        for index in range(self.num_texts):
            own = self._own[index]
            record = self._quality(rule, index)
            for one in own:
                full = None if one.name == AGREEMENT else self._of_full_model(index)
                values[one].append(one.loss(self._item(index), record, full))
            measured += 1
            self.bar.update()
            # Even if no further text lost anything, the rule would not be proven.
            if any(self._least_p(one, values[one]) > self.level for one in own):
                break
        self._skip(self.num_texts - measured)
        worst = max(self._least_p(one, lost) for one, lost in values.items())
        losses = tuple(self._loss(one, lost) for one, lost in values.items())
        return Tested(rule, worst, False, measured < self.num_texts, losses)

    def _least_p(self, requirement: Requirement, values: Sequence[float]) -> float:
        """The p-value of these losses, and of no further loss on texts that are not measured."""
        losses = Losses.of(values, requirement.is_binary).within(len(requirement.indices))
        return p_value(losses, requirement.limit)

    def _loss(self, requirement: Requirement, values: Sequence[float]) -> Loss:
        mean = Losses.of(values).mean if values else 0.0
        needed = texts_needed(requirement.limit, self.level, mean, requirement.is_binary)
        return Loss(
            requirement.task, requirement.name, requirement.limit, mean, len(values), needed
        )

    def _quality(self, rule: Rule, index: int) -> Record:
        kind = "choice" if self._item(index).choices else "untimed"
        return self.recording.record(Unit(kind, index, rule))

    def _of_full_model(self, index: int) -> Record:
        if index not in self._full:
            self._full[index] = self._quality(FULL, index)
        return self._full[index]

    def _item(self, index: int) -> Item:
        return self.recording.items[index]

    def _skip(self, count: int) -> None:
        if self.bar.total is not None:
            self.bar.total -= count
            self.bar.refresh()

    # --- speed -----------------------------------------------------------------------------------

    def gains(
        self, rules: Sequence[Rule], prompts: Sequence[int], by_time: bool, seed: int
    ) -> Mapping[Rule, Gain]:
        """What rules gain.

        Args:
            rules: that are proven.
            prompts: of the recording, which are continued.
            by_time: measure times, not only depths.
            seed: of the resampling for intervals.

        Raises:
            FloatingPointError: logits are not finite.
            OSError: the records cannot be written.
        """
        found = {}
        for rule in rules:
            if by_time:
                records = [self._timed(index, rule) for index in prompts]
                point = self._point(records, seed)
                found[rule] = Gain(point.mean_exit_layer, point.speedup, point.speedup_interval)
            else:
                records = [self._counted(index, rule) for index in prompts]
                depths = [one["exit_layers"][: one["counted"]] for one in records]
                layers = [layer for own in depths for layer in own]
                found[rule] = Gain(sum(layers) / len(layers))
        return found

    def _timed(self, index: int, rule: Rule) -> Record:
        self.recording.record(Unit("answer", index))
        record = self.recording.record(Unit("answer", index, rule))
        self.bar.update()
        return record

    def _counted(self, index: int, rule: Rule) -> Record:
        record = self.recording.record(Unit("untimed", index, rule))
        self.bar.update()
        return record

    def _point(self, records: Sequence[Record], seed: int) -> Point:
        full = [self.recording.record(Unit("answer", one["index"])) for one in records]
        tasks = [one.task for one in self.recording.items]
        points = summarize([*full, *records], tasks, seed).points()
        return next(one for one in points if one.threshold is not None)
