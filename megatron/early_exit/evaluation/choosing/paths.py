"""The rules that are tried, in paths from the safest to the most aggressive one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.evaluation.rule import Rule, curve_name
from megatron.early_exit.evaluation.settings import Settings

THRESHOLDS = (
    *(1.0, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925),
    *(0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
)
"""Tried by default. They are close together near 1. A path ends with the first rule that is not
proven, so a longer list costs little."""


@dataclass(frozen=True, slots=True)
class RulePath:
    """Rules that differ in their thresholds alone, which fall: the less sure an exit has to be, the
    earlier tokens leave.

    Attributes:
        measure: what confidence is.
        kv_policy: what later tokens see of a position that has left.
        exit_layers: the exits that are asked.
        rules: in the order in which they are tested.
        is_fitted: each exit has a threshold of its own.
    """

    measure: ExitMeasure
    kv_policy: KVPolicy
    exit_layers: tuple[int, ...]
    rules: tuple[Rule, ...]
    is_fitted: bool = False

    @property
    def name(self) -> str:
        """What its rules have in common."""
        found = curve_name(self.measure, self.kv_policy, self.exit_layers)
        return f"{found}, a threshold for each exit" if self.is_fitted else found


def paths_of(settings: Settings) -> tuple[RulePath, ...]:
    """A path for each measure, cache policy and set of exits.

    Args:
        settings: has measures, policies, sets of exits that are named one by one, and thresholds in
            any order.
    """
    thresholds = sorted(settings.thresholds, reverse=True)
    return tuple(
        RulePath(
            measure,
            policy,
            layers,
            tuple(Rule(threshold, policy, measure, layers) for threshold in thresholds),
        )
        for measure in settings.measures
        for policy in settings.kv_policies
        for layers in settings.exit_layers
        if layers is not None
    )


type Fit = Callable[[ExitMeasure, tuple[int, ...], float], tuple[float, ...]]
"""(measure, exits, share of agreement) -> the threshold of each exit."""


def fitted_paths_of(settings: Settings, fit: Fit) -> tuple[RulePath, ...]:
    """A path for each measure, cache policy and set of several exits, whose rules have a threshold
    for each exit.

    Args:
        settings: as for `paths_of`; the thresholds are the shares of agreement to which those of
            the exits are fitted.
        fit: finds them, without the texts on which the rules will be tested.
    """
    shares = sorted(settings.thresholds, reverse=True)
    found = []
    for plain in _paths_of_several_exits(settings):
        # Shares that come to the same thresholds are one rule.
        fitted: dict[tuple[float, ...], float] = {}
        for share in shares:
            fitted.setdefault(fit(plain.measure, plain.exit_layers, share), share)
        rules = (
            Rule(share, plain.kv_policy, plain.measure, plain.exit_layers, thresholds)
            for thresholds, share in fitted.items()
        )
        found.append(replace(plain, rules=tuple(rules), is_fitted=True))
    return tuple(found)


def num_paths(settings: Settings, is_fitting: bool) -> int:
    """How many paths there are.

    Args:
        settings: as for `paths_of`.
        is_fitting: with those of `fitted_paths_of`.
    """
    return len(paths_of(settings)) + is_fitting * len(_paths_of_several_exits(settings))


def has_fitted_paths(settings: Settings) -> bool:
    """Whether there are sets of several exits, which can have a threshold each."""
    return bool(_paths_of_several_exits(settings))


def _paths_of_several_exits(settings: Settings) -> list[RulePath]:
    return [one for one in paths_of(settings) if len(one.exit_layers) > 1]


def exit_sets(
    given: Sequence[tuple[int, ...] | None], exit_layers: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The sets of exits that are tried.

    Args:
        given: those of a command line, where None is all exits; none is all together, and each
            alone.
        exit_layers: the model's.
    """
    every = tuple(exit_layers)
    if given:
        return tuple(every if one is None else one for one in given)
    return (every, *((layer,) for layer in every if len(every) > 1))
