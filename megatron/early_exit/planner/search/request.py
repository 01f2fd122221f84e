"""What is to be planned: a model with exits, accelerators, and what is given of the layout."""

from dataclasses import dataclass, field

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import out_of_range
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.part_times import (
    ACHIEVED_SHARE,
    HardwareTimes,
    MeasuredTimes,
    PartTimes,
)
from megatron.early_exit.planner.costs.training_options import Recompute, TrainingOptions
from megatron.early_exit.planner.costs.update import Overlap
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_OR_MORE

_WAITS = TrainingOptions(overlaps_messages=False)


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
        achieved_share: of the accelerator's peak, in large matrix products; None for its own.
        profile: measured times that replace derived ones, if any.
        pass_overhead_s: see `model_costs`.
        overlap: what runs beside computations.
        options: of training. Chunks of a rank always let messages run beside computations, one
            chunk only if these say so.
        recomputes: what may be computed again in the backward, instead of what options say.
        context_parallel: accelerators that share the tokens of each sequence.
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
    achieved_share: float | None = None
    profile: LayerProfile | None = None
    pass_overhead_s: float = 0.0
    overlap: Overlap = field(default_factory=Overlap)
    options: TrainingOptions = _WAITS
    recomputes: tuple[Recompute, ...] = ("none",)
    context_parallel: int = 1
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    num_chunks: int | None = None
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(**{flag: getattr(self, name) for name, flag in _FLAGS.items()})
        ACHIEVED_SHARE.check_flags(self, "achieved_share")
        ZERO_OR_MORE.check(**{"--pass-overhead-us": self.pass_overhead_s * 1e6})
        parts = 2 * self.context_parallel
        if self.context_parallel > 1 and self.shape.seq_length % parts:
            # Each accelerator has a part of the beginning, and one of the end.
            allowed = f"divisors of half of --seq-length {self.shape.seq_length}"
            raise out_of_range("--context-parallel-size", self.context_parallel, allowed)
        for exits in self.placements:
            exits.validate(self.shape.num_layers, self.shape.vocab_size)

    def times(
        self, shape: ModelShape, exits: EarlyExitConfig, layout: Layout, options: TrainingOptions
    ) -> PartTimes:
        """What the parts of the model take, with a padded vocabulary and one placement."""
        if self.profile is None:
            return HardwareTimes(
                shape, exits, self.accelerator, layout, options, self.achieved_share
            )
        alone = HardwareTimes(shape, exits, self.accelerator, options=options)
        shared_by = layout.tensor_parallel * layout.context_parallel
        return MeasuredTimes(self.profile, alone, shared_by)


_FLAGS = {
    "num_accelerators": "--gpus",
    "global_batch_size": "--global-batch-size",
    "context_parallel": "--context-parallel-size",
    "tensor_parallel": "--tensor-model-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "num_chunks": "--num-virtual-stages-per-pipeline-rank",
    "microbatch_size": "--micro-batch-size",
}
