"""What a step takes beside its pipeline: gradients are summed over the replicas, weights updated.

Megatron's distributed optimizer: a reduce-scatter of gradients, an update of the part of the
weights that a replica owns, and an all-gather of bf16 weights. Both collectives move all but one
replica's part of the weights, over NVLink where all replicas are on one node, and else over as many
ports of the network as the group has accelerators on a node. Without it, gradients are all-reduced,
which moves as much as both, and each replica updates all weights. Gradients of tied embeddings and
of shared output layers are then summed over the stages that hold one. Experts have replicas of
their own: the two kinds of weights are exchanged one after the other. The norm of all gradients
keeps any rank from updating weights before all ranks have all gradients.

Two terms are those of whole steps. Each step reads its batch, synchronises the processes for its
norm and its log, and starts the kernels of its update: a fixed time. And with more nodes, whichever
is slowest has all others wait: published runs of the same work for each accelerator take 1 to 5 %
longer on 2,048 of them than on 16 (NVIDIA's dgxc-benchmarking recipes).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.costs.hardware import MEMORY_SHARE, Accelerator, link_s
from megatron.early_exit.planner.costs.layout import (
    Layout,
    embedding_stages,
    output_stages,
    stage_expert_weights,
    stage_quantized_weights,
    stage_weights,
)
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS, TrainingOptions

# Bytes of each weight, and of the gradients of embeddings between stages.
_WEIGHT, _EMBEDDING_GRADIENT = 2, 4
# Bytes moved in memory: all gradients are set to zero; for the part that a replica owns they are
# read for the norm, read with weights and both moments in fp32, which are written, as is the bf16.
_ZEROED, _UPDATED = 4, 4 + 4 * 4 + 3 * 4 + 2

_FIXED_S = 0.02
# Of the step, for each doubling of the nodes.
_SLOWEST_NODE = 0.005


@dataclass(frozen=True)
class Overlap:
    """What Megatron's flags of these names let run beside computations.

    Attributes:
        grad_reduce: the reduction, beside the last backward of each chunk of the model.
        param_gather: the gathering, beside a rank's first forward of the next step.
    """

    grad_reduce: bool = True
    param_gather: bool = False


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the update of the weights takes, if nothing runs beside it.

    Attributes:
        reduce_s: seconds to reduce the gradients of each stage.
        embedding_s: seconds to sum the gradients of tied embeddings and of shared output layers.
        optimizer_s: seconds to update the weights of each rank.
        gather_s: seconds to gather the weights of each rank.
        fixed_s: seconds of a step, whatever the model.
        slowdown: factor on the whole step, for the slowest of the nodes.
    """

    reduce_s: tuple[float, ...]
    embedding_s: float
    optimizer_s: tuple[float, ...]
    gather_s: tuple[float, ...]
    fixed_s: float = 0.0
    slowdown: float = 1.0

    def step_s(
        self, costs: CostModel, starts_s: Sequence[float], ends_s: Sequence[float], overlap: Overlap
    ) -> float:
        """Seconds of the whole step.

        Args:
            costs: of the pipeline's stages.
            starts_s: when each rank starts, in the pipeline's step.
            ends_s: when each rank ends there; the result never shrinks as one grows.
            overlap: what runs beside computations.
        """
        ranks = range(len(ends_s))
        reduced_s = max(self._reduced_s(rank, costs, ends_s[rank], overlap) for rank in ranks)
        gather_s = 0.0
        for rank in ranks:
            # The next step's first hidden states are on their way meanwhile.
            beside_s = starts_s[rank]
            beside_s += costs.stages[rank].forward_s if overlap.param_gather else 0.0
            gather_s = max(gather_s, self.gather_s[rank] - beside_s)
        update_s = self.embedding_s + max(self.optimizer_s) + gather_s
        return (reduced_s + update_s + self.fixed_s) * self.slowdown

    def _reduced_s(self, rank: int, costs: CostModel, end_s: float, overlap: Overlap) -> float:
        """When a rank's gradients are reduced."""
        num_ranks = len(self.optimizer_s)
        own = range(rank, len(costs.stages), num_ranks)
        if not overlap.grad_reduce:
            return end_s + sum(self.reduce_s[stage] for stage in own)
        reduced_s = 0.0
        for stage in reversed(own):
            # Behind the last backward of a chunk are those of the chunks before it, for as many
            # microbatches as there are ranks.
            after_s = num_ranks * sum(costs.stages[s].backward_s for s in own if s < stage)
            ready_s = end_s - after_s - costs.stages[stage].backward_s
            reduced_s = max(reduced_s, ready_s) + self.reduce_s[stage]
        return max(reduced_s, end_s)


def update_costs(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    options: TrainingOptions = DEFAULT_OPTIONS,
) -> Update:
    """What the update of a model's weights takes."""
    num_nodes = max(layout.num_accelerators / accelerator.per_node, 1)
    experts = stage_expert_weights(shape, layout)
    of_layers = experts if options.fp8 is None else stage_quantized_weights(shape, layout, exits)
    per_node, per_leaf = accelerator.per_node, accelerator.per_leaf
    parts = [
        _Part(
            weights=stage_weights(shape, layout, exits),
            quantized=tuple(all_ - own for all_, own in zip(of_layers, experts, strict=True)),
            replicas=layout.num_replicas,
            on_node=layout.replicas_per_node(per_node),
            on_leaf=layout.replicas_per_node(per_leaf),
        )
    ]
    if shape.experts is not None:
        parts.append(
            _Part(
                weights=experts,
                quantized=experts,
                replicas=layout.num_expert_replicas,
                on_node=layout.expert_replicas_per_node(per_node),
                on_leaf=layout.expert_replicas_per_node(per_leaf),
            )
        )
    return Update(
        reduce_s=_added(part.reduce_s(accelerator, options) for part in parts),
        embedding_s=_embedding_s(shape, layout, accelerator, exits),
        optimizer_s=_added(part.optimizer_s(layout, accelerator, options) for part in parts),
        gather_s=_added(part.gather_s(layout, accelerator, options) for part in parts),
        fixed_s=_FIXED_S,
        slowdown=1 + _SLOWEST_NODE * log2(num_nodes),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Weights that the same accelerators exchange: of experts, or all others.

    Attributes:
        weights: of each stage, on each accelerator.
        quantized: those of them that are multiplied in FP8, if anything is.
        replicas: accelerators that have the same.
        on_node: how many of them a node has.
        on_leaf: how many of them are below a leaf switch.
    """

    weights: tuple[float, ...]
    quantized: tuple[float, ...]
    replicas: int
    on_node: int
    on_leaf: int

    def reduce_s(self, accelerator: Accelerator, options: TrainingOptions) -> list[float]:
        """Seconds to reduce the gradients of each stage."""
        # An all-reduce is a reduce-scatter and an all-gather.
        reductions = 1 if options.distributed_optimizer else 2
        moved, link = options.gradient_bytes * self._moved, self._link(accelerator)
        return [reductions * link_s(number * moved, link) for number in self.weights]

    def gather_s(
        self, layout: Layout, accelerator: Accelerator, options: TrainingOptions
    ) -> list[float]:
        """Seconds to gather the weights of each rank."""
        moved = self._moved * options.distributed_optimizer
        in_fp8 = options.fp8 is not None and options.fp8.param_gather
        link = self._link(accelerator)
        return [
            link_s((_WEIGHT * weights - in_fp8 * quantized) * moved, link)
            for weights, quantized in self._on_ranks(layout)
        ]

    def optimizer_s(
        self, layout: Layout, accelerator: Accelerator, options: TrainingOptions
    ) -> list[float]:
        """Seconds to update the weights of each rank, and to make their copies in FP8."""
        shared_by = self.replicas if options.distributed_optimizer else 1
        touched = _ZEROED + _UPDATED / shared_by
        copied = 0 if options.fp8 is None else options.fp8.quantized_bytes
        bandwidth = MEMORY_SHARE * accelerator.memory_bytes_per_s
        return [
            (weights * touched + quantized * copied) / bandwidth
            for weights, quantized in self._on_ranks(layout)
        ]

    @property
    def _moved(self) -> float:
        """The part of the weights that an accelerator sends."""
        return (self.replicas - 1) / self.replicas

    def _on_ranks(self, layout: Layout) -> list[tuple[float, float]]:
        return [
            (
                sum(self.weights[rank :: layout.num_ranks]),
                sum(self.quantized[rank :: layout.num_ranks]),
            )
            for rank in range(layout.num_ranks)
        ]

    def _link(self, accelerator: Accelerator) -> float:
        near = accelerator.node_bytes_per_s
        if self.on_node == self.replicas:
            return near
        far = accelerator.ring_bytes_per_s(self.replicas, self.on_node, self.on_leaf)
        return min(near, self.on_node * far)


def _added(parts: Iterable[list[float]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*parts, strict=True)))


def _embedding_s(
    shape: ModelShape, layout: Layout, accelerator: Accelerator, exits: EarlyExitConfig
) -> float:
    return sum(
        _sum_s(shape, layout, accelerator, {stage % layout.num_ranks for stage in stages})
        for stages in (
            embedding_stages(shape, layout, exits),
            output_stages(shape, layout, exits),
        )
        if stages
    )


def _sum_s(shape: ModelShape, layout: Layout, accelerator: Accelerator, ranks: set[int]) -> float:
    """Seconds to sum the gradients of one matrix over the vocabulary."""
    link = accelerator.link_bytes_per_s(
        layout.spans_nodes(ranks, accelerator.per_node),
        layout.spans_nodes(ranks, accelerator.per_leaf),
    )
    # A ring brings each partner all parts but its own, twice.
    share = 2 * (len(ranks) - 1) / len(ranks)
    size = _EMBEDDING_GRADIENT * shape.projection_weights / layout.tensor_parallel
    return link_s(share * size, link)
