"""Puts partial microbatches into the bubbles of plans: extra work at next to no time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.errors import FieldError
from megatron.early_exit.planner.search.plans import Plan, fastest_first
from megatron.early_exit.planner.search.prediction import Fills
from megatron.early_exit.ranges import ZERO_OR_MORE
from megatron.early_exit.schedules.generators.bubble_filling import FILL_FLAGS


@dataclass(frozen=True, kw_only=True)
class FillRequest:
    """How bubbles are to be filled.

    Attributes:
        num_warmup: microbatches in the warm-up bubble, None for as many as are worth it.
        num_cooldown: microbatches in the cool-down bubble, None for as many as are worth it.
        backward_forward_ratio: for which the schedule is made; None for that of a plan's costs.
        most_cost: share of the step that fills may cost where their number is open.

    Raises:
        ValueError: most_cost is negative.
    """

    num_warmup: int | None = None
    num_cooldown: int | None = None
    backward_forward_ratio: float | None = None
    most_cost: float = 0.01

    def __post_init__(self) -> None:
        ZERO_OR_MORE.check(**{"--max-fill-cost": self.most_cost})


def fill_bubbles(plans: Sequence[Plan], request: FillRequest, limit_bytes: float) -> list[Plan]:
    """Fill the bubbles of plans; those without room or memory for given fills are left out.

    Args:
        plans: of the plain schedule, without fills.
        request: how.
        limit_bytes: memory of an accelerator.

    Returns:
        The plans with their fills, fastest first.

    Raises:
        ValueError: there is no room in any of the plans, or no memory.
    """
    filled: list[Plan] = []
    refusal = ""
    for plan in plans:
        try:
            filled.append(_fill(plan, request, limit_bytes))
        except FieldError as error:
            refusal = error.named(FILL_FLAGS.get(error.field, error.field))
        except ValueError as error:
            refusal = str(error)
    if not filled:
        raise ValueError(refusal)
    return fastest_first(filled)


def _fill(plan: Plan, request: FillRequest, limit_bytes: float) -> Plan:
    """The plan with as many fills as are given, or as fit, cost little, and have memory."""
    fitting = plan.costing.fitting_fills(request.backward_forward_ratio)
    most = max(fitting.num_warmup, fitting.num_cooldown)
    if request.num_warmup is not None and request.num_cooldown is not None:
        given = _with_fills(plan, request, fitting, most)
        if given.prediction.peak_bytes > limit_bytes:
            raise ValueError(
                f"--fill-explicit-bubbles takes {given.prediction.peak_bytes / 1e9:.1f} GB with so "
                f"many microbatches, allowed: {limit_bytes / 1e9:.1f} GB"
            )
        return given
    best = _with_fills(plan, request, fitting, 0)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        tried = _with_fills(plan, request, fitting, middle)
        fits = tried.prediction.peak_bytes <= limit_bytes
        if fits and tried.fill_cost <= request.most_cost:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _with_fills(plan: Plan, request: FillRequest, fitting: Fills, most: int) -> Plan:
    """A plan with what is given, and where it is open with as many as fit, up to a number."""
    warmup, cooldown = request.num_warmup, request.num_cooldown
    fills = replace(
        fitting,
        num_warmup=min(most, fitting.num_warmup) if warmup is None else warmup,
        num_cooldown=min(most, fitting.num_cooldown) if cooldown is None else cooldown,
    )
    return replace(plan, fills=fills, prediction=plan.costing.predict(fills))
