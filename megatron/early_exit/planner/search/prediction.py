"""What a candidate is predicted to take: bounds at once, and the times of its simulated step."""

from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.update import Overlap, Update, update_costs
from megatron.early_exit.planner.search.candidates import Candidate
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.simulation.long_step import StepTime, time_long_step
from megatron.early_exit.schedules.check import build_proved
from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Generator,
    Interleaved,
    OneFOneB,
    ZeroBubbleH1,
)
from megatron.early_exit.schedules.schedule import Schedule

# As training rounds what it measures.
_RATIO_DIGITS = 2


@dataclass(frozen=True, kw_only=True)
class Fills:
    """Partial microbatches in the bubbles of a step.

    Attributes:
        num_warmup: in the warm-up bubble.
        num_cooldown: in the cool-down bubble.
        backward_forward_ratio: for which the schedule is made.
    """

    num_warmup: int = 0
    num_cooldown: int = 0
    backward_forward_ratio: float = 2.0

    @property
    def number(self) -> int:
        """Fills of the warm-up and the cool-down together."""
        return self.num_warmup + self.num_cooldown


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of a candidate.

    Attributes:
        pipeline: its schedule in time.
        step_s: seconds of the whole step.
    """

    pipeline: StepTime
    step_s: float

    @property
    def peak_bytes(self) -> float:
        """The most memory that an accelerator takes."""
        return max(self.pipeline.peak_bytes)


@dataclass(frozen=True)
class Costing:
    """A candidate with its costs.

    Attributes:
        candidate: what is laid out how.
        costs: of its stages.
        update: what the update of the weights takes.
        overlap: what runs beside computations.
    """

    candidate: Candidate
    costs: CostModel
    update: Update
    overlap: Overlap

    @classmethod
    def of(cls, candidate: Candidate, request: PlanRequest) -> "Costing":
        """Derive the costs of a candidate."""
        shape, layout, exits = candidate.shape, candidate.layout, candidate.exits
        accelerator = request.accelerator
        return cls(
            candidate,
            model_costs(
                shape,
                layout,
                accelerator,
                exits,
                ExitExecution(),
                request.times(shape, exits, layout, candidate.options),
                request.pass_overhead_s,
                candidate.options,
            ),
            update_costs(shape, layout, accelerator, exits, candidate.options),
            request.overlap,
        )

    def generator(self, num_microbatches: int, fills: Fills) -> Generator:
        """The schedule of a step of so many full microbatches."""
        num_ranks = self.candidate.layout.num_ranks
        if self.candidate.zero_bubble:
            return ZeroBubbleH1(num_ranks=num_ranks, num_microbatches=num_microbatches)
        if self.candidate.num_chunks > 1:
            return Interleaved(
                num_ranks=num_ranks,
                num_microbatches=num_microbatches,
                num_chunks=self.candidate.num_chunks,
            )
        if not fills.number:
            return OneFOneB(num_ranks=num_ranks, num_microbatches=num_microbatches)
        return FilledOneFOneB(
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            backward_forward_ratio=fills.backward_forward_ratio,
            num_warmup_fills=fills.num_warmup,
            num_cooldown_fills=fills.num_cooldown,
            exit_stages=self._exit_stages,
        )

    def fitting_fills(self, backward_forward_ratio: float | None = None) -> Fills:
        """As many fills as fit into the bubbles and reach an exit or the final head.

        Args:
            backward_forward_ratio: for which the schedule is made; None for that of the costs.
        """
        if backward_forward_ratio is None:
            backward_forward_ratio = round(self.costs.backward_forward_ratio, _RATIO_DIGITS)
        generator = FilledOneFOneB(
            num_ranks=self.candidate.layout.num_ranks,
            num_microbatches=self.candidate.num_microbatches,
            backward_forward_ratio=backward_forward_ratio,
            exit_stages=self._exit_stages,
        )
        return Fills(
            num_warmup=generator.num_warmup_fills or 0,
            num_cooldown=generator.num_cooldown_fills or 0,
            backward_forward_ratio=backward_forward_ratio,
        )

    @property
    def _exit_stages(self) -> frozenset[int]:
        one = self.candidate
        return frozenset(one.exits.stages(one.layout.layers_per_stage))

    def predict(self, fills: Fills) -> Prediction:
        """Simulate a step."""

        def build(number: int) -> Schedule:
            return build_proved(self.generator(number, fills))

        group = self.candidate.layout.num_ranks if self.candidate.num_chunks > 1 else 1
        pipeline = time_long_step(build, self.candidate.num_microbatches, self.costs, group)
        starts = [rank.start_s for rank in pipeline.ranks]
        ends = [rank.end_s for rank in pipeline.ranks]
        return Prediction(
            pipeline=pipeline, step_s=self.update.step_s(self.costs, starts, ends, self.overlap)
        )

    @cached_property
    def least_step_s(self) -> float:
        """No step takes less: each rank waits for the first hidden state, does all of its work, and
        has to wait for the last gradient from the next rank."""
        layout, stages = self.candidate.layout, self.costs.stages
        starts = [0.0]
        for rank in range(layout.num_ranks - 1):
            starts.append(starts[-1] + stages[rank].forward_s + self.costs.transfer_s[rank])
        ends = [0.0] * layout.num_ranks
        for rank in reversed(range(layout.num_ranks)):
            own = stages[rank :: layout.num_ranks]
            work_s = sum(stage.forward_s + stage.backward_s for stage in own)
            ends[rank] = starts[rank] + self.candidate.num_microbatches * work_s
            if rank + 1 < layout.num_ranks:
                arrival_s = ends[rank + 1] + self.costs.transfer_s[rank]
                ends[rank] = max(ends[rank], arrival_s + stages[rank].backward_s)
        return self.update.step_s(self.costs, starts, ends, self.overlap)

    @cached_property
    def least_bytes(self) -> float:
        """No step takes less memory on its fullest rank."""
        generator = self.generator(self.candidate.num_microbatches, Fills())
        least = []
        for rank in range(generator.num_ranks):
            own = self.costs.stages[rank :: generator.num_ranks]
            kept = generator.activation_limit(rank) * min(one.activation_bytes for one in own)
            least.append(sum(one.static_bytes for one in own) + kept)
        return max(least)
