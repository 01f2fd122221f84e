"""The layouts that a request allows, before anything is known of their time and memory."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from math import inf

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.layout import Layout, stage_expert_weights
from megatron.early_exit.planner.costs.model_costs import PartSeconds, part_seconds
from megatron.early_exit.planner.costs.model_shape import ModelShape, padded_vocab_size
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS, TrainingOptions
from megatron.early_exit.planner.costs.weight_memory import bytes_of_weight
from megatron.early_exit.planner.search.divisions import Division, divisions
from megatron.early_exit.planner.search.request import PlanRequest, more_memory
from megatron.early_exit.planner.search.stage_layers import stage_layers


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout of a model with exits.

    Attributes:
        shape: of the model, with the vocabulary padded for the layout.
        layout: of its stages.
        num_chunks: on each rank; above 1, the schedule is interleaved.
        num_microbatches: of a step, for each replica.
        exits: of the model, with their placement.
        options: of its training.
        zero_bubble: the schedule is ZB-H1 (arXiv 2401.10241), which training does not run.
    """

    shape: ModelShape
    layout: Layout
    num_chunks: int
    num_microbatches: int
    exits: EarlyExitConfig
    options: TrainingOptions = DEFAULT_OPTIONS
    zero_bubble: bool = False


@dataclass(frozen=True)
class Group:
    """Candidates of the same division and recomputation.

    Attributes:
        division: of the accelerators.
        variants: exits in each of their placements, with the options of training.
        least_step_s: no step of them takes less; 0 where that is not known before their costs are.
        parts: what the parts of the model take.
    """

    division: Division
    variants: tuple[tuple[EarlyExitConfig, TrainingOptions], ...]
    least_step_s: float
    parts: "_Parts"

    def candidates(self) -> Iterator[Candidate]:
        """All of them: each order of the ranks, and layers of each stage."""
        one, request = self.division, self.parts.request
        layers = [
            [request.layers_per_stage]
            if request.layers_per_stage is not None
            else list(
                stage_layers(
                    self.parts.seconds(one, exits, options),
                    *(exits, request.shape.num_layers, one.pipeline, one.chunks),
                )
            )
            for exits, options in self.variants
        ]
        for mapping in one.mappings:
            if mapping not in request.mappings:
                continue
            for (exits, options), divided in zip(self.variants, layers, strict=True):
                for layers_per_stage in divided:
                    yield Candidate(
                        shape=self.parts.shape(one.tensor),
                        layout=_layout(one, layers_per_stage, mapping),
                        num_chunks=one.chunks,
                        num_microbatches=request.global_batch_size // one.replicas // one.size,
                        exits=exits,
                        options=options,
                    )


def groups(request: PlanRequest) -> Iterator[Group]:
    """All layouts that divide the accelerators, the heads, the experts and the batch. Experts can
    be divided in so many ways that those which cannot fit into memory are left out at once, and
    that the others come with a bound of their time.

    Raises:
        ValueError: there is none; says what does not divide what, or that none can fit.
    """
    parts = _Parts(request)
    least_bytes, has_some = inf, False
    for one in divisions(request):
        if not set(one.mappings) & set(request.mappings):
            continue
        for recompute in request.recomputes:
            options = replace(request.options, recompute=recompute)
            options = replace(
                options, overlaps_messages=one.chunks > 1 or options.overlaps_messages
            )
            variants, bounds_s = [], []
            for exits in request.placements:
                needed, bound_s = 0.0, 0.0
                if one.experts:
                    needed = parts.least_bytes(one, exits, options)
                    bound_s = parts.least_step_s(one, exits, options)
                least_bytes = min(least_bytes, needed)
                if needed <= request.memory_limit_bytes:
                    variants.append((exits, options))
                    bounds_s.append(bound_s)
            if variants:
                has_some = True
                yield Group(one, tuple(variants), min(bounds_s), parts)
    if least_bytes == inf:
        raise ValueError(
            "--use-tp-pp-dp-mapping is not possible with experts on so many GPUs, allowed: expert "
            "times expert tensor parallelism as large as tensor times context parallelism"
        )
    if not has_some:
        raise ValueError(
            f"none of the layouts of {request.num_accelerators} GPUs fits into "
            f"{request.memory_limit_bytes / 1e9:.1f} GB each: layers and their activations take "
            f"{least_bytes / 1e9:.1f} GB in the smallest; allowed: {more_memory(request)}"
        )


def candidates(request: PlanRequest) -> Iterator[Candidate]:
    """The candidates of all groups.

    Raises:
        ValueError: see `groups`.
    """
    for group in groups(request):
        yield from group.candidates()


def _layout(one: Division, layers_per_stage: tuple[int, ...], mapping: bool = False) -> Layout:
    return Layout(
        layers_per_stage=layers_per_stage,
        num_ranks=len(layers_per_stage) // one.chunks,
        tensor_parallel=one.tensor,
        context_parallel=one.context,
        data_parallel=one.replicas,
        microbatch_size=one.size,
        use_tp_pp_dp_mapping=mapping,
        expert_parallel=max(one.experts, 1),
        expert_tensor_parallel=one.expert_tensor,
    )


@dataclass(frozen=True)
class _Parts:
    """What the parts of the model take in the layouts of a request."""

    request: PlanRequest
    found: dict[Hashable, PartSeconds] = field(default_factory=dict)
    static_bytes: dict[Hashable, float] = field(default_factory=dict)

    def shape(self, tensor: int) -> ModelShape:
        """With the vocabulary padded for so many tensor-parallel partners."""
        shape = self.request.shape
        return replace(shape, vocab_size=padded_vocab_size(shape.vocab_size, tensor))

    def seconds(
        self, one: Division, exits: EarlyExitConfig, options: TrainingOptions
    ) -> PartSeconds:
        """By the accelerators that share a layer, and sequences of a microbatch."""
        sizes = one.tensor, one.context, one.experts, one.expert_tensor, one.size
        # No other option differs between candidates in what these parts take.
        key = *sizes, exits, options.recompute
        if key not in self.found:
            request, shape = self.request, self.shape(one.tensor)
            # Stages do not matter.
            alone = replace(one, chunks=1)
            layout = _layout(alone, (shape.num_layers,))
            times = request.times(shape, exits, layout, options)
            self.found[key] = part_seconds(
                shape, layout, request.accelerator, exits, times, options
            )
        return self.found[key]

    def least_step_s(
        self, one: Division, exits: EarlyExitConfig, options: TrainingOptions
    ) -> float:
        """The slowest rank computes for so long at least."""
        parts, request = self.seconds(one, exits, options), self.request
        work_s = request.shape.num_layers * parts.layer_s + parts.embedding_s + parts.head_s
        work_s += len(exits.positions) * parts.exit_s
        return request.global_batch_size // one.replicas // one.size * work_s / one.pipeline

    def least_bytes(self, one: Division, exits: EarlyExitConfig, options: TrainingOptions) -> float:
        """The fullest rank has at least so much of the layers, however many each has: a rank r of p
        keeps p - r microbatches of 1F1B, and more if it is interleaved."""
        shape, request = self.request.shape, self.request
        key = one.tensor, one.context, one.replicas, one.experts, one.expert_tensor
        if key not in self.static_bytes:
            layout = _layout(replace(one, chunks=1), (1,))
            own_bytes, expert_bytes = bytes_of_weight(layout, options)
            self.static_bytes[key] = own_bytes * shape.divided_weights / one.tensor
            self.static_bytes[key] += expert_bytes * stage_expert_weights(shape, layout)[0]
        static_bytes, kept = self.static_bytes[key], self.seconds(one, exits, options).layer_bytes
        number = request.global_batch_size // one.replicas // one.size
        layers_of_bytes = sum(
            1 / (static_bytes + kept * min(one.pipeline - rank, number))
            for rank in range(one.pipeline)
        )
        return shape.num_layers / layers_of_bytes
