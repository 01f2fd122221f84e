"""How a model is laid out over the ranks of a pipeline, and where its exits come to lie."""

from dataclasses import dataclass
from itertools import accumulate

from megatron.early_exit.config import EarlyExitConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model over accelerators.

    Attributes:
        layers_per_stage: backbone layers of each stage, in the order of the stages.
        num_ranks: pipeline-parallel size; stage s is on rank s modulo num_ranks.
        tensor_parallel: accelerators that share each layer, with sequence parallelism.
        data_parallel: replicas, which also share the optimizer's states.
        microbatch_size: sequences of a microbatch.
        use_tp_pp_dp_mapping: Megatron's flag of this name: the stages of one pipeline are
            neighbours, rather than the replicas of one stage. Tensor-parallel groups always are.

    Raises:
        ValueError: a number is out of its range.
    """

    layers_per_stage: tuple[int, ...]
    num_ranks: int
    tensor_parallel: int = 1
    data_parallel: int = 1
    microbatch_size: int = 1
    use_tp_pp_dp_mapping: bool = False

    def __post_init__(self) -> None:
        for name in ("num_ranks", "tensor_parallel", "data_parallel", "microbatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is out of range, allowed: from 1")
        if not self.layers_per_stage or len(self.layers_per_stage) % self.num_ranks:
            raise ValueError(
                f"layers_per_stage has {len(self.layers_per_stage)} stages, allowed: as many for "
                f"each of the {self.num_ranks} ranks"
            )
        if min(self.layers_per_stage) < 0:
            raise ValueError(
                f"layers_per_stage {self.layers_per_stage} is out of range, allowed: 0 or more"
            )

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.layers_per_stage)

    def leaves_node(self, stage: int, per_node: int) -> bool:
        """Whether a stage and the next one are on different nodes, in any of the replicas.

        Args:
            stage: counted from 0.
            per_node: accelerators of a node.
        """
        ranks = stage % self.num_ranks, (stage + 1) % self.num_ranks
        for replica in range(self.data_parallel):
            here, there = (self._first_accelerator(rank, replica) for rank in ranks)
            if here // per_node != there // per_node:
                return True
        return False

    def _first_accelerator(self, rank: int, replica: int) -> int:
        if self.use_tp_pp_dp_mapping:
            return (replica * self.num_ranks + rank) * self.tensor_parallel
        return (rank * self.data_parallel + replica) * self.tensor_parallel

    def exit_stages(self, exits: EarlyExitConfig) -> tuple[int, ...]:
        """The stage of each exit: that of the layer it follows, or before which it is placed."""
        ends = list(accumulate(self.layers_per_stage))
        shift = 1 if exits.pre_exit else 0
        layers = [position + shift for position in exits.positions]
        return tuple(next(s for s, end in enumerate(ends) if layer <= end) for layer in layers)
