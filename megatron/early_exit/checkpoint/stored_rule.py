"""The rule of early exit that is stored with a model, and what was promised of it.

`tools/choose_threshold.py` finds it by calibration. It is how the model is used where a request
says nothing of exits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from megatron.early_exit.checkpoint.location import DESCRIPTION_NAME
from megatron.early_exit.checkpoint.text_files import read_json, write_whole
from megatron.early_exit.config import EarlyExitConfig, ExitMeasure, KVPolicy
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_TO_ONE

KEY = "rule"
"""Where it is in `early_exit_model.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What is promised of a rule, and of what it was found.

    Attributes:
        agreement: expected share of an answer's tokens that the full model would choose, at least;
            None where that was not asked for.
        task_loss: expected loss of `score` against the full model's answer to the same prompt, in
            points of 100, at most; None where that was not asked for.
        score: name of the score.
        confidence: probability with which the calibration gives a rule that keeps the promise.
        tasks: what the texts were of; the promise holds for each.
        texts: number of texts.
        texts_sha256: hash of the texts.
        max_tokens: most tokens of an answer.
        speedup: against the full model, on the machine of the calibration; None where it was not
            measured. It is that of the best of several rules, so it is rather too large.
        speedup_interval: by resampling texts; its lower end is what may be relied on.
        mean_exit_layer: number of layers behind a token, on average.
        dtype, weight_dtype: number formats in which the model was computed.
        quantize_heads: projections to the vocabulary were in `weight_dtype`, too; None where no
            weights were.
        date: day of the calibration, YYYY-MM-DD.
        commit: of the code; None where it is in no repository.

    Raises:
        ValueError: a share is out of range.
    """

    agreement: float | None
    task_loss: float | None
    score: str | None
    confidence: float
    tasks: tuple[str, ...]
    texts: int
    texts_sha256: str
    max_tokens: int
    speedup: float | None
    speedup_interval: tuple[float, float] | None
    mean_exit_layer: float
    dtype: str
    weight_dtype: str | None
    quantize_heads: bool | None
    date: str
    commit: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.speedup_interval is not None:
            object.__setattr__(self, "speedup_interval", tuple(self.speedup_interval))
        ZERO_TO_ONE.check(agreement=self.agreement, confidence=self.confidence)
        ONE_OR_MORE.check(texts=self.texts, max_tokens=self.max_tokens)

    @property
    def number_format(self) -> str:
        """The number formats in words."""
        return number_format(self.dtype, self.weight_dtype, self.quantize_heads)

    def sentence(self) -> str:
        """The promise in words."""
        kept = []
        if self.agreement is not None:
            kept.append(f"{100 * self.agreement:.6g} % agreement with the full model")
        if self.task_loss is not None:
            kept.append(f"at most {self.task_loss:g} points of {self.score} lost")
        return (
            f"{' and '.join(kept)} on texts like those of {', '.join(self.tasks)}, answered "
            f"greedily, with a confidence of {self.confidence:g} ({self.texts} texts, {self.date}, "
            f"found in {self.number_format})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRule:
    """How tokens leave where a request says nothing.

    Attributes:
        early_exit_threshold: least confidence to leave at an exit, 0 to 1; None where each exit has
            one of its own.
        exit_measure: how confidence is measured.
        exit_layers: the exits that are asked, each named by the number of layers before it.
        kv_policy: what later tokens see of a position that has left.
        exit_thresholds: the least confidence for each of `exit_layers`, from 0 to 1; None where
            `early_exit_threshold` is that of all.
        iteration: name of the folder of weights of which it was found.
        promise: what is promised of the rule, and by which calibration.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    early_exit_threshold: float | None
    exit_measure: ExitMeasure
    exit_layers: tuple[int, ...]
    kv_policy: KVPolicy
    exit_thresholds: tuple[float, ...] | None = None
    iteration: str
    promise: Promise

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        ZERO_TO_ONE.check(early_exit_threshold=self.early_exit_threshold)
        self._check_exit_thresholds()
        for name, kind in (("exit_measure", ExitMeasure), ("kv_policy", KVPolicy)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{KEY}: {name} {getattr(self, name)!r}, allowed: {allowed}")

    def _check_exit_thresholds(self) -> None:
        if (self.early_exit_threshold is None) == (self.exit_thresholds is None):
            raise ValueError(
                f"{KEY}: early_exit_threshold {self.early_exit_threshold} beside exit_thresholds "
                f"{self.exit_thresholds}, allowed: one of the two"
            )
        if self.exit_thresholds is None:
            return
        object.__setattr__(self, "exit_thresholds", tuple(self.exit_thresholds))
        for one in self.exit_thresholds:
            ZERO_TO_ONE.check(exit_thresholds=one)
        if len(self.exit_thresholds) != len(self.exit_layers):
            raise ValueError(
                f"{KEY}: exit_thresholds {' '.join(map(str, self.exit_thresholds))}, allowed: one "
                f"for each of exit_layers {' '.join(map(str, self.exit_layers))}"
            )

    def check(self, early_exit: EarlyExitConfig) -> None:
        """Refuse a rule that is not of this model.

        Raises:
            ValueError: it asks exits, or gates, that the model does not have.
        """
        unknown = [one for one in self.exit_layers if one not in early_exit.positions]
        if unknown or not self.exit_layers:
            known = " ".join(map(str, early_exit.positions)) or "none"
            given = " ".join(map(str, self.exit_layers)) or "none"
            raise ValueError(f"{KEY}: exit_layers {given}, allowed: the model's exits, {known}")
        if self.exit_measure == "gate" and not early_exit.use_exit_gate:
            raise ValueError(f"{KEY}: exit_measure gate, allowed: with exits that have gates")

    def of(self, iteration: str) -> "StoredRule | None":
        """The rule, if it was found of the weights in a folder of this name."""
        return self if self.iteration == iteration else None

    def defaults(self) -> dict[str, Any]:
        """The fields of a request that it decides."""
        thresholds = ("early_exit_threshold", "exit_thresholds")
        names = (*thresholds, "exit_measure", "exit_layers", "kv_policy")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def defaults_beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request that it decides where the request says something itself.

        Args:
            given: what the request says; None is nothing.
        """
        said = {name for name, value in given.items() if value is not None}
        left_out = said | meaningless_beside(given, self.exit_measure)
        return {name: one for name, one in self.defaults().items() if name not in left_out}

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StoredRule":
        """The inverse of `to_dict`; what a newer version has added is left out.

        Raises:
            ValueError: a field is missing or out of its range.
        """
        try:
            promise = Promise(**_known(Promise, values["promise"]))
            rule = cls(**{**_known(cls, values), "promise": promise})
            # A value of the wrong kind is refused here, not where it is shown.
            rule.sentence()
            promise.sentence()
            return rule
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{KEY} does not fit this version: {error}") from error

    def sentence(self) -> str:
        """The rule in words."""
        layers = ", ".join(map(str, self.exit_layers))
        thresholds = self.exit_thresholds or (self.early_exit_threshold,)
        each = "threshold" if self.exit_thresholds is None else "thresholds"
        return (
            f"mode early_exit, {each} {', '.join(f'{one:g}' for one in thresholds)} of "
            f"{self.exit_measure} at exits {layers}, kv_policy {self.kv_policy}"
        )


def number_format(dtype: str, weight_dtype: str | None, quantize_heads: bool | None) -> str:
    """Number formats in words, such as "bf16, weights in int8 but for heads".

    Args:
        dtype: in which a model is computed.
        weight_dtype: in which its matrices are kept; None is `dtype`.
        quantize_heads: so are projections to the vocabulary; None where no matrices are.
    """
    weights = "" if weight_dtype is None else f", weights in {weight_dtype}"
    return f"{dtype}{weights}{' but for heads' if quantize_heads is False else ''}"


def meaningless_beside(given: Mapping[str, Any], measure: str | None) -> set[str]:
    """The fields of a stored rule that mean nothing beside what is given.

    Args:
        given: fields of a request, or flags; None is nothing.
        measure: of the rule.
    """
    found = set()
    if given.get("exit_thresholds") is not None:
        # One for each of the exits, which are all where that is not said.
        found |= {"early_exit_threshold", "exit_layers"}
    if given.get("early_exit_threshold") is not None or given.get("exit_layers") is not None:
        # They are of the rule's exits, and instead of one threshold for all.
        found.add("exit_thresholds")
    if given.get("exit_measure") not in (None, measure):
        # What is sure by one measure is not by another.
        found |= {"early_exit_threshold", "exit_thresholds"}
    return found


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    # What a version has added has a default.
    names = [one.name for one in fields(kind) if one.name in values or one.default is MISSING]
    return {name: values[name] for name in names}


def store_rule(save_dir: Path, rule: StoredRule | None, before: Mapping[str, Any]) -> None:
    """Put a rule into a model's description, or take it out.

    A reader at any moment sees the old description or the new one, and nothing else in it changes.

    Args:
        save_dir: of the model.
        rule: None takes out what is there.
        before: `described_without_rule` of the model for which the rule was found.

    Raises:
        ValueError: the model's description cannot be read, or is another one than before.
        OSError: it cannot be written.
    """
    path = save_dir / DESCRIPTION_NAME
    now = described_without_rule(save_dir)
    if now != before:
        raise ValueError(
            f"{path} has changed since the model was loaded, allowed: the same model; the rule is "
            "not stored"
        )
    with_rule = {} if rule is None else {KEY: rule.to_dict()}
    write_whole(path, json.dumps({**now, **with_rule}, indent=2) + "\n")


def described_without_rule(save_dir: Path) -> dict[str, Any]:
    """What a model's description says beside its rule.

    Raises:
        ValueError: there is no description, or it is damaged.
    """
    path = save_dir / DESCRIPTION_NAME
    if not path.is_file():
        raise ValueError(
            f"{save_dir} has no {DESCRIPTION_NAME}, into which a rule could be stored, allowed: a "
            "model that tools/checkpoint.py or this package's training has written"
        )
    values = read_json(path)
    values.pop(KEY, None)
    return values


def dropped(rule: StoredRule | None, kept: StoredRule | None, reason: str) -> Sequence[str]:
    """What is to be said where a conversion leaves a rule out.

    Args:
        rule: of the source.
        kept: of the result.
        reason: why the promise would not hold.
    """
    if rule is None or kept is not None:
        return ()
    return (
        f"note: the stored rule ({rule.sentence()}) is left out: {reason}; "
        "tools/choose_threshold.py finds a new one",
    )
