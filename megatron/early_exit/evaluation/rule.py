"""The rules that are compared: by which head each token is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.inference import SamplingParams


@dataclass(frozen=True, slots=True)
class Rule:
    """A greedy way to decode: the full model's, or that of exits with a threshold.

    Attributes:
        threshold: least confidence to leave at an exit, 0 to 1; None is the full model. With
            `exit_thresholds` it is the share of agreement that they were fitted to.
        kv_policy: what later tokens see of a position that has left, see `SamplingParams`.
        exit_measure: what confidence is; None is what is stored with the model.
        exit_layers: the exits that are used; None is all.
        exit_thresholds: the least confidence for each of these exits; None is `threshold` for all.
    """

    threshold: float | None = None
    kv_policy: KVPolicy = "exact"
    exit_measure: ExitMeasure | None = None
    exit_layers: tuple[int, ...] | None = None
    exit_thresholds: tuple[float, ...] | None = None

    def params(self, **fields: Any) -> SamplingParams:
        """A request that decodes or scores by the rule.

        Args:
            fields: further fields of the request.
        """
        if self.threshold is None:
            return SamplingParams(mode="full", **fields)
        return SamplingParams(
            mode="early_exit",
            early_exit_threshold=self.threshold if self.exit_thresholds is None else None,
            exit_thresholds=self.exit_thresholds,
            kv_policy=self.kv_policy,
            exit_measure=self.exit_measure,
            exit_layers=self.exit_layers,
            **fields,
        )


FULL = Rule()


def curve_name(
    measure: str | None, kv_policy: str | None, exit_layers: Sequence[int] | None
) -> str:
    """What rules are called that differ by their thresholds alone.

    Args:
        measure, kv_policy: of the rules.
        exit_layers: the exits that they use; None is all.
    """
    exits = "" if exit_layers is None else f", exits {exits_name(exit_layers)}"
    return f"{measure}, {kv_policy}{exits}"


def exits_name(exit_layers: Sequence[int] | None) -> str:
    """Some exits as flags have them, such as 4+8; None is all."""
    return "all" if exit_layers is None else "+".join(map(str, exit_layers))
