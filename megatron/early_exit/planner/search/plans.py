"""Finds the fastest layouts that fit into memory.

Candidates are tried in the order of a bound below which no step of theirs can be. Once as many as
are asked for take less than the bound of the next, no other can be among them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from megatron.early_exit.planner.search.candidates import candidates
from megatron.early_exit.planner.search.prediction import Costing, Fills, Prediction
from megatron.early_exit.planner.search.request import PlanRequest

Progress = Callable[[list[Costing]], Iterable[Costing]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout with its predicted step.

    Attributes:
        costing: the layout and its costs.
        prediction: the step.
        plain_s: seconds of the step without fills.
        fills: what fills its bubbles.
    """

    costing: Costing
    prediction: Prediction
    plain_s: float
    fills: Fills = field(default_factory=Fills)

    @property
    def fill_cost(self) -> float:
        """What the fills add to the step, as a share of it."""
        return self.prediction.step_s / self.plain_s - 1


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The answer to a request.

    Attributes:
        best: the fastest layouts, fastest first.
        num_candidates: layouts that divide what they have to divide.
        num_fitting: those of them that may fit into memory.
        num_simulated: those of them that no bound ruled out.
    """

    best: list[Plan]
    num_candidates: int
    num_fitting: int
    num_simulated: int


def find_plans(
    request: PlanRequest, number: int, every_variant: bool = False, progress: Progress = list
) -> Plans:
    """Find the fastest layouts.

    Args:
        request: what is planned.
        number: how many of them, 1 or more.
        every_variant: list layouts of the same tensor, pipeline and data parallelism that differ in
            chunks, microbatches, order of the ranks or placement of exits, not only the best.
        progress: goes over the layouts that may be simulated.

    Raises:
        ValueError: no layout divides what it has to, or none fits into memory.
    """
    costings = list(_different(Costing.of(one, request) for one in candidates(request)))
    limit = request.memory_limit_bytes
    fitting = [costing for costing in costings if costing.least_bytes <= limit]
    fitting.sort(key=lambda costing: costing.least_step_s)
    found: dict[Hashable, Plan] = {}
    num_simulated = 0
    for costing in progress(fitting):
        best = fastest_first(found.values())[:number]
        if len(best) == number and costing.least_step_s > best[-1].prediction.step_s:
            break
        layout = costing.candidate.layout
        key = costing if every_variant else (layout.tensor_parallel, layout.num_ranks)
        if key in found and found[key].prediction.step_s < costing.least_step_s:
            continue
        num_simulated += 1
        prediction = costing.predict(Fills())
        if prediction.peak_bytes > limit:
            continue
        plan = Plan(costing=costing, prediction=prediction, plain_s=prediction.step_s)
        found[key] = fastest_first([plan, found.get(key, plan)])[0]
    if not found:
        raise ValueError(_why_nothing_fits(request, costings))
    return Plans(
        best=fastest_first(found.values())[:number],
        num_candidates=len(costings),
        num_fitting=len(fitting),
        num_simulated=num_simulated,
    )


def fastest_first(plans: Iterable[Plan]) -> list[Plan]:
    """Plans in the order of their predicted steps."""
    return sorted(plans, key=lambda plan: plan.prediction.step_s)


def _different(costings: Iterable[Costing]) -> Iterator[Costing]:
    """Leave out what costs the same as the same division in another order of the ranks, or with
    exits in another place."""
    seen = set()
    for costing in costings:
        one = costing.candidate
        key = one.num_chunks, one.num_microbatches, costing.costs, costing.update
        if key not in seen:
            seen.add(key)
            yield costing


def _why_nothing_fits(request: PlanRequest, costings: list[Costing]) -> str:
    least = min(costings, key=lambda costing: costing.least_bytes)
    layout = least.candidate.layout
    needed = max(least.predict(Fills()).peak_bytes, least.least_bytes)
    return (
        f"none of {len(costings)} layouts of {request.num_accelerators} GPUs fits into "
        f"{request.memory_limit_bytes / 1e9:.1f} GB each: one of the smallest, tensor "
        f"{layout.tensor_parallel} x pipeline {layout.num_ranks} x data {layout.data_parallel} "
        f"parallel with microbatches of {layout.microbatch_size}, takes {needed / 1e9:.1f} GB; "
        "allowed: more --gpus, or ones with more memory"
    )
