"""Finds the fastest layouts that fit into memory.

Candidates are tried in the order of a bound below which no step of theirs can be. Once as many as
are asked for take less than the bound of the next, no other can be among them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from megatron.early_exit.planner.search.candidates import groups
from megatron.early_exit.planner.search.prediction import Costing, Fills, Prediction
from megatron.early_exit.planner.search.request import PlanRequest, more_memory

Progress = Callable[[Iterable[Costing]], Iterable[Costing]]


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
        num_candidates: layouts that divide what they have to divide; with experts at least so
            many.
        num_fitting: those of them that may fit into memory, or were never looked at.
        num_simulated: those of them that no bound ruled out.
    """

    best: list[Plan]
    num_candidates: int
    num_fitting: int
    num_simulated: int


def find_plans(
    request: PlanRequest, number: int, every_variant: bool = False, progress: Progress = iter
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
    queue, limit = _Queue(request), request.memory_limit_bytes
    found: dict[Hashable, Plan] = {}
    num_simulated = 0
    for costing in progress(queue):
        best = fastest_first(found.values())[:number]
        if len(best) == number and costing.least_step_s > best[-1].prediction.step_s:
            break
        layout = costing.candidate.layout
        sizes = layout.tensor_parallel, layout.context_parallel, layout.num_ranks
        key = costing if every_variant else sizes
        if key in found and found[key].prediction.step_s < costing.least_step_s:
            continue
        num_simulated += 1
        prediction = costing.predict(Fills())
        if prediction.peak_bytes > limit:
            continue
        plan = Plan(costing=costing, prediction=prediction, plain_s=prediction.step_s)
        found[key] = fastest_first([plan, found.get(key, plan)])[0]
    if not found:
        raise ValueError(_why_nothing_fits(request, queue.costings))
    return Plans(
        best=fastest_first(found.values())[:number],
        num_candidates=queue.num_candidates,
        num_fitting=len(queue),
        num_simulated=num_simulated,
    )


def fastest_first(plans: Iterable[Plan]) -> list[Plan]:
    """Plans in the order of their predicted steps."""
    return sorted(plans, key=lambda plan: plan.prediction.step_s)


class _Queue:
    """What may fit into memory, in the order of the bounds of its steps. Costs are derived only
    once the bound that is known without them is reached.

    Attributes:
        costings: all that costs were derived of, but for those that cost the same as the same
            division in another order of the ranks, or with exits in another place.
    """

    def __init__(self, request: PlanRequest) -> None:
        self.costings: list[Costing] = []
        self._request = request
        self._seen: set[Hashable] = set()
        self._fitting: list[tuple[float, int, Costing]] = []
        self._num_fitting = 0
        self._waiting = sorted(groups(request), key=lambda group: group.least_step_s)
        self._waiting.reverse()
        # Without bounds, all are as if they came first.
        while self._waiting and not self._waiting[-1].least_step_s:
            self._derive_next()

    @property
    def num_candidates(self) -> int:
        """Layouts that cost something else than others, as far as that is known."""
        return len(self.costings) + len(self._waiting)

    def __len__(self) -> int:
        """Those of them that may fit into memory, as far as that is known."""
        return self._num_fitting + len(self._waiting)

    def __iter__(self) -> Iterator[Costing]:
        """Each that may fit, once."""
        while self._fitting or self._waiting:
            while self._waiting and not self._knows_first:
                self._derive_next()
            if self._fitting:
                yield heappop(self._fitting)[-1]

    @property
    def _knows_first(self) -> bool:
        """Whether none of those that costs are not derived of yet can be the next."""
        return bool(self._fitting) and self._fitting[0][0] < self._waiting[-1].least_step_s

    def _derive_next(self) -> None:
        for one in self._waiting.pop().candidates():
            costing = Costing.of(one, self._request)
            key = one.num_chunks, one.num_microbatches, costing.costs, costing.update
            if key in self._seen:
                continue
            self._seen.add(key)
            self.costings.append(costing)
            if costing.least_bytes <= self._request.memory_limit_bytes:
                self._num_fitting += 1
                heappush(self._fitting, (costing.least_step_s, len(self.costings), costing))


def _why_nothing_fits(request: PlanRequest, costings: list[Costing]) -> str:
    least = min(costings, key=lambda costing: costing.least_bytes)
    layout = least.candidate.layout
    needed = max(least.predict(Fills()).peak_bytes, least.least_bytes)
    shared = f" x context {layout.context_parallel}" if layout.context_parallel > 1 else ""
    return (
        f"none of {len(costings)} layouts of {request.num_accelerators} GPUs fits into "
        f"{request.memory_limit_bytes / 1e9:.1f} GB each: one of the smallest, tensor "
        f"{layout.tensor_parallel} x pipeline {layout.num_ranks} x data {layout.data_parallel}"
        f"{shared} parallel with microbatches of {layout.microbatch_size}, takes "
        f"{needed / 1e9:.1f} GB; allowed: {more_memory(request)}"
    )
