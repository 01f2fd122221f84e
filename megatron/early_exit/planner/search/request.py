"""What is to be planned: a model with exits, accelerators, and what is given of the layout."""

from dataclasses import dataclass, field

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.part_times import (
    ACHIEVED_SHARE,
    HardwareTimes,
    MeasuredTimes,
    PartTimes,
)
from megatron.early_exit.planner.costs.update import Overlap
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_OR_MORE


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a planner is asked.

    Attributes:
        shape: of the model; its vocabulary is padded for each layout.
        placements: the same exits, placed in one way or two.
        accelerator: of which there are num_accelerators.
        num_accelerators: to be used, all of them.
        global_batch_size: sequences of a step.
        memory_limit_bytes: of each accelerator.
        achieved_share: of the accelerator's peak, in matrix products.
        profile: measured times that replace derived ones, if any.
        pass_overhead_s: see `model_costs`.
        overlap: what runs beside computations.
        tensor_parallel: where it is given, as are the following; None for any.
        pipeline_parallel: stages of the pipeline.
        num_chunks: on each rank, 1 for the plain schedule.
        microbatch_size: sequences of a microbatch.

    Raises:
        ValueError: a number is out of its range; named by its flag.
    """

    shape: ModelShape
    placements: tuple[EarlyExitConfig, ...]
    accelerator: Accelerator
    num_accelerators: int
    global_batch_size: int
    memory_limit_bytes: float
    achieved_share: float = 0.5
    profile: LayerProfile | None = None
    pass_overhead_s: float = 0.0
    overlap: Overlap = field(default_factory=Overlap)
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    num_chunks: int | None = None
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(**{flag: getattr(self, name) for name, flag in _FLAGS.items()})
        ACHIEVED_SHARE.check_flags(self, "achieved_share")
        ZERO_OR_MORE.check(**{"--pass-overhead-us": self.pass_overhead_s * 1e6})
        for exits in self.placements:
            exits.validate(self.shape.num_layers, self.shape.vocab_size)

    def times(self, shape: ModelShape, exits: EarlyExitConfig) -> PartTimes:
        """What the parts of the model take, with a padded vocabulary and one placement."""
        derived = HardwareTimes(shape, exits, self.accelerator, self.achieved_share)
        return derived if self.profile is None else MeasuredTimes(self.profile, derived)


_FLAGS = {
    "num_accelerators": "--gpus",
    "global_batch_size": "--global-batch-size",
    "tensor_parallel": "--tensor-model-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "num_chunks": "--num-virtual-stages-per-pipeline-rank",
    "microbatch_size": "--micro-batch-size",
}
