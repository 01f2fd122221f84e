"""The work of a measurement, in pieces whose records can be found again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.settings import Settings

OUTSIDE = "transformers"
"""What the outside baseline is called in records and tables."""
OUTSIDE_KINDS = {"answer": OUTSIDE, "choice": f"{OUTSIDE}_choice", "batch": f"{OUTSIDE}_batch"}
"""The kinds of its units, by the kinds of the engine's."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work, whose record can be found again.

    Attributes:
        kind: "answer" continues a prompt, "untimed" does so once without measuring times, "choice"
            scores choices behind it, "batch" continues several prompts together; of
            `OUTSIDE_KINDS`, the same beside the outside baseline.
        index: of the prompt, or of the batch.
        rule: which heads choose the tokens.
    """

    kind: str
    index: int
    rule: Rule = FULL

    def fields(self) -> Record:
        """What its record is found by."""
        rule = self.rule
        return {
            "kind": self.kind,
            "index": self.index,
            "threshold": rule.threshold,
            "kv_policy": None if rule == FULL else rule.kv_policy,
            "measure": None if rule == FULL else rule.exit_measure,
            "exits_asked": None if rule.exit_layers is None else list(rule.exit_layers),
            "exit_thresholds": None if rule.exit_thresholds is None else list(rule.exit_thresholds),
        }


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two records of the same unit have in common, and no others."""
    names = ("kind", "index", "threshold", "kv_policy", "measure")
    # Records of earlier versions have no thresholds of single exits.
    lists = (record["exits_asked"], record.get("exit_thresholds"))
    return (
        *(record[name] for name in names),
        *(None if one is None else tuple(one) for one in lists),
    )


def units_of(items: Sequence[Item], settings: Settings, has_outside: bool) -> list[Unit]:
    """All work, in its order: the full model's answer to a prompt comes before the others.

    Args:
        items: the prompts.
        settings: what is measured.
        has_outside: an outside baseline is measured, too.
    """
    rules = settings.rules()
    units = []
    for index, item in enumerate(items):
        kind = "choice" if item.choices else "answer"
        units += [Unit(kind, index, rule) for rule in (FULL, *rules)]
        units += [Unit(OUTSIDE_KINDS[kind], index)] if has_outside else []
    if settings.batch_size is not None:
        continued = sum(not item.choices for item in items)
        for index in range(math.ceil(continued / settings.batch_size)):
            units += [Unit("batch", index, rule) for rule in rules]
            units += [Unit(OUTSIDE_KINDS["batch"], index)] if has_outside else []
    return units
