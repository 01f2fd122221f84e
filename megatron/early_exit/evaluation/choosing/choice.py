"""What a calibration has found, which of the proven rules is the fastest, and what is stored."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from megatron.early_exit.checkpoint.stored_rule import Promise, StoredRule
from megatron.early_exit.evaluation.choosing.calibration import Gain, Tested
from megatron.early_exit.evaluation.choosing.paths import RulePath
from megatron.early_exit.evaluation.choosing.wish import AGREEMENT, Requirement, Wish
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.rule import Rule
from megatron.early_exit.evaluation.tradeoff import threshold_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a calibration has found.

    Attributes:
        level: the largest p-value that proves a rule.
        tested: the rules of each path that were tested.
        gains: of the proven ones.
        num_layers: of the model.
    """

    level: float
    tested: Mapping[RulePath, Sequence[Tested]]
    gains: Mapping[Rule, Gain]
    num_layers: int

    def fastest(self) -> Rule | None:
        """The proven rule that is most certainly fast; None where none is certainly faster than the
        full model."""
        certain = {rule: self._certain_gain(gain) for rule, gain in self.gains.items()}
        best = max(certain, key=lambda rule: certain[rule], default=None)
        return best if best is not None and certain[best] > 1 else None

    def _certain_gain(self, gain: Gain) -> float:
        """How much faster than the full model a rule is at least; 1 is not known to be faster."""
        # What runs all layers can be faster only by chance.
        if gain.mean_exit_layer >= self.num_layers:
            return 1.0
        if gain.speedup is None:
            return self.num_layers / gain.mean_exit_layer
        return 1.0 if gain.speedup_interval is None else gain.speedup_interval[0]

    def lines(self) -> list[str]:
        """A table of the rules of each path."""
        found = []
        for path, own in self.tested.items():
            found.append(path.name)
            first = "agreement" if path.is_fitted else "threshold"
            head = f"{first:>11}{'p-value':>11}  {'proven':8}{'speed-up':>20}{'layers':>8}"
            found.append(f"{head}  lost of what may be, on the texts of a task")
            found += [self._line(one) for one in own]
            found.append("")
        return found

    def _line(self, one: Tested) -> str:
        gain = self.gains.get(one.rule)
        speed = "" if gain is None or gain.speedup is None else speed_of(gain)
        depth = "" if gain is None else f"{gain.mean_exit_layer:.1f}"
        losses = [
            f"{loss.name} {loss.mean:.3%} of {loss.limit:.3%} ({loss.texts} of {loss.task})"
            + ("" if one.is_proven else _needs(loss.needed))
            for loss in one.losses
        ]
        assert one.rule.threshold is not None
        name, proven = threshold_name(one.rule.threshold), "yes" if one.is_proven else "no"
        bound = f"{'>=' if one.is_cut else ''}{one.p_value:.2g}"
        row = f"{name:>11}{bound:>11}  {proven:8}{speed:>20}{depth:>8}"
        return f"{row}  {'; '.join(losses)}{_each(one.rule.exit_thresholds)}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "level": self.level,
            "tested": [asdict(one) for own in self.tested.values() for one in own],
            "gains": [{"rule": asdict(rule), **asdict(gain)} for rule, gain in self.gains.items()],
        }


def speed_of(gain: Gain | Promise) -> str:
    """A measured speed-up, with its interval."""
    interval = gain.speedup_interval
    between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return f"{gain.speedup:.2f}x{between}"


def _each(thresholds: Sequence[float] | None) -> str:
    return "; thresholds " + " ".join(f"{one:g}" for one in thresholds) if thresholds else ""


def _needs(count: int | None) -> str:
    return ", no number of texts proves it" if count is None else f", {count:,} texts would do"


def texts_hash(items: Sequence[Item]) -> str:
    """A hash of texts, with their references and choices, in their order."""
    lines = (json.dumps(one.as_dict(), sort_keys=True) for one in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stored_rule(
    rule: Rule,
    gain: Gain,
    *,
    wish: Wish,
    requirements: Sequence[Requirement],
    items: Sequence[Item],
    max_tokens: int,
    iteration: str,
    model: Mapping[str, Any],
    commit: str | None,
) -> StoredRule:
    """What is stored with the model.

    Args:
        rule: the chosen one.
        gain: what it gains.
        wish: what it keeps.
        requirements: what was proven of it.
        items: the texts.
        max_tokens: most tokens of an answer.
        iteration: name of the folder of weights.
        model: how it was loaded, with its `dtype`, `weight_dtype` and
            `quantize_heads`.
        commit: of the code.
    """
    assert rule.threshold is not None
    assert rule.exit_measure is not None
    assert rule.exit_layers is not None
    scores = [one.name for one in requirements if one.name != AGREEMENT]
    return StoredRule(
        early_exit_threshold=rule.threshold if rule.exit_thresholds is None else None,
        exit_thresholds=rule.exit_thresholds,
        exit_measure=rule.exit_measure,
        exit_layers=rule.exit_layers,
        kv_policy=rule.kv_policy,
        iteration=iteration,
        promise=Promise(
            agreement=wish.agreement,
            task_loss=wish.task_loss,
            score=", ".join(dict.fromkeys(scores)) or None,
            confidence=wish.confidence,
            tasks=tuple(dict.fromkeys(one.task for one in items)),
            texts=len(items),
            texts_sha256=texts_hash(items),
            max_tokens=max_tokens,
            speedup=gain.speedup,
            speedup_interval=gain.speedup_interval,
            mean_exit_layer=gain.mean_exit_layer,
            dtype=model["dtype"],
            weight_dtype=model["weight_dtype"],
            quantize_heads=model["quantize_heads"],
            date=datetime.now(UTC).date().isoformat(),
            commit=commit,
        ),
    )
