"""What is to be planned: a model with exits, accelerators, and what is given of the layout."""

from dataclasses import dataclass, field

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError, as_flag, out_of_range
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
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_OR_MORE, Range

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
        context_parallel: accelerators that share the tokens of each sequence; None for as many as
            leave each enough of them (`context_sizes`).
        tensor_parallel: where it is given, as are the following; None for any.
        pipeline_parallel: stages of the pipeline.
        num_chunks: on each rank, 1 for the plain schedule.
        microbatch_size: sequences of a microbatch.
        expert_parallel: groups of accelerators with other experts.
        expert_tensor_parallel: accelerators that share each expert.
        layers_per_stage: backbone layers of each stage, as many for each rank as num_chunks.
        mappings: orders of the ranks, with Megatron's --use-tp-pp-dp-mapping or without.

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
    context_parallel: int | None = 1
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    num_chunks: int | None = None
    microbatch_size: int | None = None
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    mappings: tuple[bool, ...] = (False, True)

    def __post_init__(self) -> None:
        _GPUS.check(**{"--gpus": self.num_accelerators})
        _LAYERS.check(**{"--num-layers": self.shape.num_layers})
        ONE_OR_MORE.check(**{flag: getattr(self, name) for name, flag in _FLAGS.items()})
        ACHIEVED_SHARE.check_flags(self, "achieved_share")
        ZERO_OR_MORE.check(**{"--pass-overhead-us": self.pass_overhead_s * 1e6})
        given = self.context_parallel or 1
        if given > 1 and self.shape.seq_length % (2 * given):
            # Each accelerator has a part of the beginning, and one of the end.
            allowed = f"divisors of half of --seq-length {self.shape.seq_length}"
            raise out_of_range("--context-parallel-size", given, allowed)
        self._check_experts()
        fp8 = self.options.fp8
        if fp8 is not None and self.accelerator.fp8_flops_per_s is None:
            raise FieldError(
                "--fp8-format", "is not possible on a GPU without FP8", value=fp8.format
            )
        if fp8 is not None and fp8.recipe == "mxfp8" and not self.accelerator.is_blackwell:
            raise FieldError(
                "--fp8-recipe",
                "needs a Blackwell GPU",
                "delayed, tensorwise, blockwise",
                value="mxfp8",
            )
        for exits in self.placements:
            exits.validate(self.shape.num_layers, self.shape.vocab_size)

    def _check_experts(self) -> None:
        experts = self.shape.experts
        if experts is None:
            for name in ("expert_parallel", "expert_tensor_parallel"):
                if (value := getattr(self, name)) is not None:
                    problem = "has no effect without --num-experts"
                    raise FieldError(_FLAGS[name], problem, value=value)
            return
        for exits in self.placements:
            for part in exits.branch_parts:
                if part.has_mlp:
                    raise ValueError(
                        f"{as_flag(part.field)} cannot be combined with --num-experts "
                        f"{experts.num_experts}: exits of a mixture of experts have a norm and a "
                        "projection"
                    )

    @property
    def context_sizes(self) -> list[int]:
        """Context-parallel sizes that are tried."""
        if self.context_parallel is not None:
            return [self.context_parallel]
        sizes = [1]
        while (size := 2 * sizes[-1]) * _FEWEST_TOKENS <= self.shape.seq_length:
            if self.shape.seq_length % (2 * size) or self.num_accelerators % size:
                break
            sizes.append(size)
        return sizes

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


def more_memory(request: PlanRequest) -> str:
    """What may make a model fit that does not."""
    ways = ["more --gpus", "ones with more memory"]
    if request.context_parallel is not None and request.shape.seq_length >= 2 * _FEWEST_TOKENS:
        ways.append("--context-parallel-size above " + str(request.context_parallel))
    if "full" not in request.recomputes:
        ways.append("--recompute-granularity full")
    return ", ".join(ways[:-1]) + f", or {ways[-1]}"


# More than any machine or model has, and few enough to divide them.
_GPUS = Range(least=1, most=2**20, is_integer=True)
_LAYERS = Range(least=1, most=2**12, is_integer=True)

# Of a sequence on an accelerator, below which no more of them share it unless they are asked to.
_FEWEST_TOKENS = 8192

_FLAGS = {
    "num_accelerators": "--gpus",
    "global_batch_size": "--global-batch-size",
    "context_parallel": "--context-parallel-size",
    "tensor_parallel": "--tensor-model-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "num_chunks": "--num-virtual-stages-per-pipeline-rank",
    "microbatch_size": "--micro-batch-size",
    "expert_parallel": "--expert-model-parallel-size",
    "expert_tensor_parallel": "--expert-tensor-parallel-size",
}
