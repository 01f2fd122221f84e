"""How a model is laid out over the ranks of a pipeline, and how many weights each stage holds."""

from collections.abc import Collection
from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import out_of_range
from megatron.early_exit.planner.costs.model_shape import ModelShape, part_weights
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_OR_MORE


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model over accelerators.

    Attributes:
        layers_per_stage: backbone layers of each stage, in the order of the stages.
        num_ranks: pipeline-parallel size; stage s is on rank s modulo num_ranks.
        tensor_parallel: accelerators that share each layer.
        context_parallel: accelerators that share the tokens of each sequence.
        data_parallel: replicas, which also share the optimizer's states.
        microbatch_size: sequences of a microbatch.
        use_tp_pp_dp_mapping: Megatron's flag of this name: the stages of one pipeline are
            neighbours, rather than the replicas of one stage. Tensor-parallel groups always are.
        expert_parallel: groups of accelerators of a stage that each have other experts.
        expert_tensor_parallel: accelerators of such a group, which share each expert.

    Raises:
        ValueError: a number is out of its range, or experts do not divide the accelerators of a
            stage.
    """

    layers_per_stage: tuple[int, ...]
    num_ranks: int
    tensor_parallel: int = 1
    context_parallel: int = 1
    data_parallel: int = 1
    microbatch_size: int = 1
    use_tp_pp_dp_mapping: bool = False
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1

    def __post_init__(self) -> None:
        sizes = ("num_ranks", "tensor_parallel", "context_parallel", "data_parallel")
        of_experts = ("expert_parallel", "expert_tensor_parallel")
        for name in (*sizes, *of_experts, "microbatch_size"):
            ONE_OR_MORE.check(**{name: getattr(self, name)})
        if not self.layers_per_stage or len(self.layers_per_stage) % self.num_ranks:
            raise ValueError(
                f"layers_per_stage has {len(self.layers_per_stage)} stages, allowed: as many for "
                f"each of the {self.num_ranks} ranks"
            )
        ZERO_OR_MORE.check(layers_per_stage=min(self.layers_per_stage))
        of_stage = self.num_replicas * self.tensor_parallel
        if of_stage % self._expert_size:
            allowed = f"divisors of the {of_stage} accelerators of a stage"
            names = "expert_parallel * expert_tensor_parallel"
            raise out_of_range(names, self._expert_size, allowed)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.layers_per_stage)

    @property
    def is_even(self) -> bool:
        """Whether all stages have as many layers."""
        return len(set(self.layers_per_stage)) == 1

    def leaves_node(self, stage: int, per_node: int) -> bool:
        """Whether a stage and the next one are on different nodes of `per_node` accelerators, in
        any of the replicas."""
        return self.spans_nodes({stage % self.num_ranks, (stage + 1) % self.num_ranks}, per_node)

    def spans_nodes(self, ranks: Collection[int], per_node: int) -> bool:
        """Whether ranks of a pipeline are on different nodes of `per_node` accelerators, in any of
        the replicas."""
        # Where on its node an accelerator is repeats after at most so many replicas.
        for replica in range(min(self.data_parallel, per_node)):
            if len({self._first_accelerator(rank, replica) // per_node for rank in ranks}) > 1:
                return True
        return False

    @property
    def num_replicas(self) -> int:
        """Accelerators that hold the same weights, and add up their gradients."""
        return self.data_parallel * self.context_parallel

    @property
    def num_accelerators(self) -> int:
        """Accelerators of all ranks and replicas."""
        return self.num_ranks * self.tensor_parallel * self.num_replicas

    def replicas_per_node(self, per_node: int) -> int:
        """How many replicas of a stage, or parts of such, a node of `per_node` accelerators has."""
        apart = self.tensor_parallel
        if self.use_tp_pp_dp_mapping:
            on_node = self.context_on_node(per_node)
            whole = max(per_node // (self._context_size * self.num_ranks), 1)
            return min(self.num_replicas, on_node * min(whole, self.data_parallel))
        return min(self.num_replicas, max(per_node // apart, 1))

    @property
    def num_expert_replicas(self) -> int:
        """Accelerators that hold the same experts, and add up their gradients."""
        return self.num_replicas * self.tensor_parallel // self._expert_size

    def expert_replicas_per_node(self, per_node: int) -> int:
        """How many accelerators with the same experts a node of `per_node` accelerators has."""
        # With --use-tp-pp-dp-mapping, Megatron has the stages of a pipeline between them.
        ranks_between = self.num_ranks if self.use_tp_pp_dp_mapping else 1
        return min(
            self.num_expert_replicas, max(per_node // (self._expert_size * ranks_between), 1)
        )

    def experts_on_node(self, per_node: int) -> int:
        """How many of the groups with other experts a node of `per_node` accelerators has."""
        return min(self.expert_parallel, max(per_node // self.expert_tensor_parallel, 1))

    def context_on_node(self, per_node: int) -> int:
        """How many of the accelerators that share a sequence a node of `per_node` has."""
        return min(self.context_parallel, max(per_node // self.tensor_parallel, 1))

    @property
    def _expert_size(self) -> int:
        return self.expert_parallel * self.expert_tensor_parallel

    @property
    def _context_size(self) -> int:
        return self.tensor_parallel * self.context_parallel

    def _first_accelerator(self, rank: int, replica: int) -> int:
        if self.use_tp_pp_dp_mapping:
            return (replica * self.num_ranks + rank) * self._context_size
        return (rank * self.data_parallel + replica) * self._context_size


ONE_ACCELERATOR = Layout(layers_per_stage=(1,), num_ranks=1)
"""A layer that no accelerators share."""


def stage_weights(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> tuple[float, ...]:
    """Weights of each stage but for experts, on each accelerator of its tensor-parallel group."""
    exit_stages = exits.stages(layout.layers_per_stage)
    with_embedding = embedding_stages(shape, layout, exits)
    with_output = output_stages(shape, layout, exits)
    branch = sum(part_weights(part, shape) for part in exits.branch_parts)
    of_layer, of_router = shape.divided_weights, shape.router_weights
    found = []
    for stage, num_layers in enumerate(layout.layers_per_stage):
        num_exits = exit_stages.count(stage)
        projections = int(stage in with_embedding) + int(stage in with_output)
        projections += num_exits * exits.untie_exit_output_weights
        weights = num_layers * of_layer + num_exits * branch
        weights += projections * shape.projection_weights
        found.append(weights / layout.tensor_parallel + num_layers * of_router)
    return tuple(found)


def stage_expert_weights(shape: ModelShape, layout: Layout) -> tuple[float, ...]:
    """Weights of the experts of each stage, on each accelerator."""
    of_layer = shape.expert_weights / (layout.expert_parallel * layout.expert_tensor_parallel)
    return tuple(number * of_layer for number in layout.layers_per_stage)


def stage_quantized_weights(
    shape: ModelShape, layout: Layout, exits: EarlyExitConfig
) -> tuple[float, ...]:
    """Those of the weights of each stage that are multiplied in FP8, if anything is: of the layers,
    and of exits' MLPs and blocks."""
    exit_stages = exits.stages(layout.layers_per_stage)
    branch = sum(
        part_weights(part, shape) for part in exits.branch_parts if part.tensors in ("mlp", "layer")
    )
    experts, of_layer = stage_expert_weights(shape, layout), shape.divided_weights
    found = []
    for stage, num_layers in enumerate(layout.layers_per_stage):
        divided = num_layers * of_layer + exit_stages.count(stage) * branch
        found.append(divided / layout.tensor_parallel + experts[stage])
    return tuple(found)


def embedding_stages(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> frozenset[int]:
    """The stages that hold the embedding, or the one copy of it that all share that is tied."""
    stages = {0}
    is_tied = shape.share_embeddings_and_output_weights
    if not exits.untie_exit_output_weights and (is_tied or not exits.share_final_head):
        stages |= set(exits.stages(layout.layers_per_stage))
    if is_tied:
        stages.add(layout.num_stages - 1)
    return frozenset(stages)


def output_stages(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> frozenset[int]:
    """The stages that hold an output layer that is not the embedding, or a copy of it for exits
    that share the final head."""
    if shape.share_embeddings_and_output_weights:
        return frozenset()
    stages = {layout.num_stages - 1}
    if exits.share_final_head:
        stages |= set(exits.stages(layout.layers_per_stage))
    return frozenset(stages)
