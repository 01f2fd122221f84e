"""A schedule on stages without a model, which take given times, as in the papers' figures."""

from dataclasses import dataclass
from typing import Literal

from megatron.early_exit.errors import FieldError
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.ranges import ONE_OR_MORE, Range
from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Generator,
    Interleaved,
    OneFOneB,
    Tuning,
    ZeroBubbleH1,
)
from megatron.early_exit.schedules.generators.bubble_filling import BACKWARD_FORWARD_RATIO

ScheduleName = Literal["1f1b", "interleaved", "zb-h1", "filled", "tuning"]

_MOST_RATIO = 100


@dataclass(frozen=True, kw_only=True)
class SingleSchedule:
    """One schedule in the setting of a figure.

    Attributes:
        name: of the schedule.
        num_ranks: pipeline-parallel size.
        num_microbatches: full ones of a step.
        num_chunks: on each rank, of the interleaved schedule.
        exit_stages: the stages that have an exit, counted from 0.
        stage_ratios: forward of each stage over `forward_s`; none for stages that are all alike.
        exit_stage_ratio: forward of an exit, or of the final head, over `forward_s`.
        backward_forward_ratio: backward of anything over its forward.
        forward_s: seconds of the forward of a stage whose ratio is 1.
        num_warmup_fills: of the filled schedule, None for all that fit.
        num_cooldown_fills: of the filled schedule, None for all that fit.

    Raises:
        ValueError: a number is out of its range; named by its flag.
    """

    name: ScheduleName
    num_ranks: int
    num_microbatches: int
    num_chunks: int = 1
    exit_stages: frozenset[int] = frozenset()
    stage_ratios: tuple[float, ...] = ()
    exit_stage_ratio: float = 0.5
    backward_forward_ratio: float = 2.0
    forward_s: float = 1e-3
    num_warmup_fills: int | None = None
    num_cooldown_fills: int | None = None

    def __post_init__(self) -> None:
        flags = {
            "--pipeline-model-parallel-size": self.num_ranks,
            "--num-microbatches": self.num_microbatches,
            "--num-virtual-stages-per-pipeline-rank": self.num_chunks,
        }
        ONE_OR_MORE.check(**flags)
        if self.num_chunks > 1 and self.name != "interleaved":
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_chunks} has no effect with "
                f"--schedule {self.name}, allowed: with --schedule interleaved"
            )
        for stage in self.exit_stages:
            Range(least=0, most=self.num_stages - 1).check(**{"--exit-stages": stage})
        Range(least=0, most=_MOST_RATIO).check_flags(self, "exit_stage_ratio")
        for ratio in self.stage_ratios:
            Range(least=0, most=_MOST_RATIO, excludes_least=True).check(**{"--stage-ratios": ratio})
        if self.stage_ratios and len(self.stage_ratios) != self.num_stages:
            problem = f"has {len(self.stage_ratios)} numbers"
            raise FieldError("--stage-ratios", problem, f"{self.num_stages}, one for each stage")
        BACKWARD_FORWARD_RATIO.check_flags(self, "backward_forward_ratio")

    @property
    def num_stages(self) -> int:
        """Stages of all ranks together."""
        return self.num_ranks * self.num_chunks

    def generator(self) -> Generator:
        """What makes the schedule.

        Raises:
            ValueError: a number is out of its range; named by its flag.
        """
        try:
            return self._generator()
        except FieldError as error:
            raise ValueError(error.named(_FLAGS.get(error.field, error.field))) from None

    def _generator(self) -> Generator:
        ranks, number = self.num_ranks, self.num_microbatches
        match self.name:
            case "1f1b":
                return OneFOneB(num_ranks=ranks, num_microbatches=number)
            case "interleaved":
                return Interleaved(
                    num_ranks=ranks, num_microbatches=number, num_chunks=self.num_chunks
                )
            case "zb-h1":
                return ZeroBubbleH1(num_ranks=ranks, num_microbatches=number)
            case "filled":
                return FilledOneFOneB(
                    num_ranks=ranks,
                    num_microbatches=number,
                    backward_forward_ratio=self.backward_forward_ratio,
                    num_warmup_fills=self.num_warmup_fills,
                    num_cooldown_fills=self.num_cooldown_fills,
                    exit_stages=self.exit_stages,
                )
            case "tuning":
                return Tuning(
                    num_ranks=ranks, num_microbatches=number, exit_stages=self.exit_stages
                )

    def costs(self) -> CostModel:
        """The costs of its stages: exits are deferred, the final head takes as long as an exit."""
        exit_s = self.exit_stage_ratio * self.forward_s
        ratio = self.backward_forward_ratio
        stages = []
        for stage in range(self.num_stages):
            head_s = exit_s * (stage == self.num_stages - 1 and self.name != "tuning")
            own_s = exit_s * (1 + ratio) * (stage in self.exit_stages)
            stage_ratio = self.stage_ratios[stage] if self.stage_ratios else 1.0
            forward_s = stage_ratio * self.forward_s + head_s
            stages.append(
                StageCost(
                    forward_s=forward_s,
                    backward_s=ratio * forward_s + own_s,
                    # What a product's backward is made of: two products, one for the weights.
                    weight_gradient_s=ratio * forward_s / 2,
                    local_backward_s=own_s,
                )
            )
        return CostModel(stages=tuple(stages), transfer_s=(0.0,) * (self.num_stages - 1))


_FLAGS = {
    "num_ranks": "--pipeline-model-parallel-size",
    "num_microbatches": "--num-microbatches",
    "num_warmup_fills": "--num-fill-warmup-microbatches",
    "num_cooldown_fills": "--num-fill-cooldown-microbatches",
    "exit_stages": "--exit-stages",
}
