"""The flags of bubble filling (EE-LLM, arXiv 2312.04916), and what they do to a run's batches."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.flags import FlagFields, refuse_beside
from megatron.early_exit.ranges import ZERO_OR_MORE
from megatron.early_exit.schedules.generators import FilledOneFOneB
from megatron.early_exit.schedules.generators.bubble_filling import (
    AUTO_RATIO,
    BACKWARD_FORWARD_RATIO,
    FILL_FLAGS,
    parse_ratio,
)
from megatron.early_exit.training.loop.exit_stages import exit_stages

MEASURED_RATIO = "measured_backward_forward_ratio"
"""What has been measured: an attribute of Megatron's arguments, which are saved with the model."""

# The low end of what is published and measured: as many fills fit into nearly every run.
_ASSUMED_RATIO = 1.5
_ONE_LIST = "a step is one list of passes"

_REFUSED: dict[str, tuple[object, str]] = {
    "num_layers_per_virtual_pipeline_stage": (None, "chunks leave smaller bubbles"),
    "num_virtual_stages_per_pipeline_rank": (None, "chunks leave smaller bubbles"),
    "rampup_batch_size": (None, "fills are counted in --global-batch-size"),
    "step_batch_size_schedule": (None, "fills are counted in --global-batch-size"),
    "decrease_batch_size_if_needed": (False, "fills are counted in --global-batch-size"),
    "mtp_num_layers": (None, "fills end before the layers that predict more tokens"),
    "num_experts": (None, "fills would reach some routers more often than others"),
    "hybrid_layer_pattern": (None, "exits end plain transformer layers"),
    "tune_exit": (False, "there are no gradients to wait for"),
    "cuda_graph_impl": ("none", _ONE_LIST),
    "fine_grained_activation_offloading": (False, _ONE_LIST),
}
"""Flags that have no place beside filled bubbles: the one value that has, and why."""


@dataclass(frozen=True, kw_only=True)
class FillingOptions(FlagFields):
    """How the bubbles of 1F1B are filled.

    Raises:
        ValueError: a field is outside its range, or has no effect; the message names the flag.
    """

    fill_explicit_bubbles: bool = False
    """Run extra microbatches in the bubbles at the beginning and the end of each 1F1B step, through
    a part of the pipeline (EE-LLM, arXiv 2312.04916): a step uses more samples in the same time."""

    num_fill_warmup_microbatches: int | None = None
    """Number of extra microbatches in the bubble of the warm-up, which train the exits of the first
    stages, but not their gates (default: as many as fit; more make a step longer)."""

    num_fill_cooldown_microbatches: int | None = None
    """Number of extra microbatches in the bubble of the cool-down, which train the last stages
    (default: as many as fit; more make a step longer)."""

    backward_forward_ratio: Any = field(
        default=AUTO_RATIO, metadata={"argparse_meta": {"type": parse_ratio, "metavar": "RATIO"}}
    )
    """Time of a backward pass divided by that of a forward pass, which determines how many
    microbatches fit into the bubbles; auto (the default) measures it in the second to the fourth
    iteration and fills bubbles from then on. It is saved with the model, and printed: give that
    number to repeat a run exactly."""

    fill_samples: Literal["extra", "from-batch"] = "extra"
    """Where the samples of the extra microbatches come from: extra adds them to
    --global-batch-size, from-batch takes them from it, so that fewer microbatches run through the
    whole pipeline. A step has as many samples from its first iteration on: where the ratio is
    measured, extra adds those of the fills that fit if a backward takes 1.5 forwards, and never
    fills more."""

    def __post_init__(self) -> None:
        ratio = self.backward_forward_ratio
        if ratio != AUTO_RATIO and ratio not in BACKWARD_FORWARD_RATIO:
            allowed = f"{BACKWARD_FORWARD_RATIO}, or {AUTO_RATIO}"
            raise out_of_range("--backward-forward-ratio", ratio, allowed)
        ZERO_OR_MORE.check_flags(
            self, "num_fill_warmup_microbatches", "num_fill_cooldown_microbatches"
        )
        if not self.fill_explicit_bubbles:
            self.refuse_changed(
                *("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches"),
                *("backward_forward_ratio", "fill_samples"),
                without="--fill-explicit-bubbles",
            )

    @property
    def is_measured(self) -> bool:
        """Whether the ratio is to be measured; without fills nothing depends on it."""
        has_none = self.num_fill_warmup_microbatches == self.num_fill_cooldown_microbatches == 0
        return self.backward_forward_ratio == AUTO_RATIO and not has_none

    @property
    def assumed_ratio(self) -> float:
        """The ratio to use until one has been measured."""
        ratio = self.backward_forward_ratio
        return _ASSUMED_RATIO if ratio == AUTO_RATIO else float(ratio)

    def places(self, stages: int, exit_stages: frozenset[int], ratio: float) -> FilledOneFOneB:
        """The schedule of a step with its fills and a single full microbatch.

        Args:
            stages: of the pipeline.
            exit_stages: the stages that have exits.
            ratio: time of a backward over that of a forward.

        Raises:
            ValueError: more fills are requested than there are places for.
        """
        try:
            return FilledOneFOneB(
                num_ranks=stages,
                num_microbatches=1,
                backward_forward_ratio=ratio,
                num_warmup_fills=self.num_fill_warmup_microbatches,
                num_cooldown_fills=self.num_fill_cooldown_microbatches,
                exit_stages=exit_stages,
            )
        except FieldError as error:
            raise ValueError(error.named(FILL_FLAGS.get(error.field, error.field))) from None

    def generator(
        self, stages: int, microbatches: int, exit_stages: frozenset[int], ratio: float
    ) -> FilledOneFOneB:
        """The schedule of a step of so many microbatches, including fills; see `places`.

        Where the ratio is measured, extra samples are those that `plan_fills` has added for the
        assumed ratio: a larger ratio fills no more, a smaller one fills less and leaves the rest to
        the whole pipeline. Where a measured ratio has room for more fills than there are
        microbatches, there are as many as with the assumed ratio, for which `plan_fills` checks a
        run before it starts.

        Raises:
            ValueError: see `places`; or no microbatch would be left for the whole pipeline.
        """
        filled = self.places(stages, exit_stages, ratio)
        if self.is_measured and self.fill_samples == "extra":
            added = self.places(stages, exit_stages, self.assumed_ratio)
            filled = replace(
                filled,
                num_warmup_fills=min(len(filled.warmup_depths), len(added.warmup_depths)),
                num_cooldown_fills=min(len(filled.cooldown_depths), len(added.cooldown_depths)),
            )
        fills = len(filled.warmup_depths) + len(filled.cooldown_depths)
        if microbatches <= fills and self.is_measured and ratio > self.assumed_ratio:
            return self.generator(stages, microbatches, exit_stages, self.assumed_ratio)
        if microbatches <= fills:
            raise ValueError(
                f"--fill-explicit-bubbles takes {fills} of the {microbatches} "
                "microbatches of a step and leaves none for the whole pipeline: give a larger "
                "--global-batch-size, or smaller numbers of fills"
            )
        return replace(filled, num_microbatches=microbatches - fills)


def plan_fills(args: Namespace, options: FillingOptions, exits: EarlyExitConfig) -> str:
    """Count the samples of fills in the global batch of checked arguments.

    Returns:
        A line that describes the microbatches of a step.

    Raises:
        ValueError: the flags cannot be combined.
    """
    refuse_beside("--fill-explicit-bubbles", args, _REFUSED)
    stages = args.pipeline_model_parallel_size
    if stages < 2:
        raise ValueError(
            f"--fill-explicit-bubbles has no effect with --pipeline-model-parallel-size {stages}: "
            "a single stage has no bubbles"
        )
    samples = args.micro_batch_size * args.data_parallel_size
    own = exit_stages(args, exits)
    filled = options.places(stages, own, options.assumed_ratio)
    warmup, cooldown = len(filled.warmup_depths), len(filled.cooldown_depths)
    if options.fill_samples == "extra":
        args.global_batch_size += (warmup + cooldown) * samples
    microbatches = args.global_batch_size // samples
    options.generator(stages, microbatches, own, options.assumed_ratio)
    measured = (
        f" once the ratio is measured; if it is {options.assumed_ratio:g}:"
        if options.is_measured
        else ""
    )
    return (
        f"bubble filling:{measured} {warmup} microbatches in the warm-up and {cooldown} in the "
        f"cool-down of {microbatches}, global batch size {args.global_batch_size}"
    )
