"""Which process holds what part of a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.weights import Weights
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.tensor_parallel import TensorParallel
from megatron.early_exit.ranges import ONE_OR_MORE

_LAYERS, _EXITS, _MTP = "decoder.layers.", "exits.", "mtp."


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The part of one process. The ranks of a stage are neighbours.

    Attributes:
        rank: of this process.
        num_ranks: processes of the engine.
        stage: of the pipeline, which this process is part of.
        num_stages: of the pipeline.
        tensor: the ranks that share the stage; None where it has only this one.
        group: all processes.
    """

    rank: int
    num_ranks: int
    stage: int
    num_stages: int
    tensor: TensorParallel | None
    group: distributed.ProcessGroup

    @property
    def stage_size(self) -> int:
        """Ranks that share a stage."""
        return self.num_ranks // self.num_stages

    @property
    def leader(self) -> int:
        """The first rank of the stage."""
        return self.stage * self.stage_size

    @property
    def peers(self) -> range:
        """The other ranks of the stage, which its leader tells what to compute."""
        return range(self.leader + 1, self.next_leader)

    @property
    def next_leader(self) -> int:
        """The first rank of the next stage."""
        return self.leader + self.stage_size

    @property
    def last_leader(self) -> int:
        """The first rank of the last stage."""
        return self.num_ranks - self.stage_size

    @property
    def is_first_stage(self) -> bool:
        """Tokens come in here."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """The final head is here."""
        return self.stage == self.num_stages - 1

    def check(self, architecture: Architecture) -> None:
        """See whether a model can be divided like this.

        Raises:
            ValueError: it cannot.
        """
        if architecture.num_layers < self.num_stages:
            raise ValueError(
                f"pipeline_parallel {self.num_stages} is not possible, allowed: up to the model's "
                f"num_layers {architecture.num_layers}"
            )
        if self.tensor is not None:
            self.tensor.architecture(architecture)

    def layers(self, num_layers: int) -> range:
        """The stage's layers, counted from 0."""
        ends = self._ends(num_layers)
        return range(ends[self.stage], ends[self.stage + 1])

    def _ends(self, num_layers: int) -> list[int]:
        return [num_layers * stage // self.num_stages for stage in range(self.num_stages + 1)]

    def exit_stages(self, num_layers: int, early_exit: EarlyExitConfig) -> tuple[int, ...]:
        """The stage of each exit of the whole model."""
        layers_per_stage = [end - first for first, end in pairwise(self._ends(num_layers))]
        return tuple(early_exit.placed(pre_exit=False).stages(layers_per_stage))

    def exits(self, num_layers: int, early_exit: EarlyExitConfig) -> range:
        """The stage's exits, counted from 0. Each is behind the layer that it follows, also if it
        was trained before the next one."""
        stages = self.exit_stages(num_layers, early_exit)
        first = sum(stage < self.stage for stage in stages)
        return range(first, first + stages.count(self.stage))


def join(
    tensor_parallel: int, pipeline_parallel: int, device: torch.device | str | None
) -> tuple[RankInfo, torch.device]:
    """Find this process's part; all processes must call this together.

    Args:
        tensor_parallel: ranks that share a stage.
        pipeline_parallel: stages.
        device: where to run; by default this process's GPU if there is one, else the CPU.

    Raises:
        ValueError: the number of processes is not that of the layout.
    """
    ONE_OR_MORE.check(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    wanted = tensor_parallel * pipeline_parallel
    started = distributed.is_initialized()
    found = distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    if found != wanted:
        raise ValueError(
            f"tensor_parallel {tensor_parallel} x pipeline_parallel {pipeline_parallel} needs "
            f"{wanted} processes (torchrun --nproc-per-node {wanted}), but there are {found}"
        )
    if not started:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = distributed.get_rank()
    stage, own = divmod(rank, tensor_parallel)
    tensor = None
    for number in range(pipeline_parallel):
        ranks = list(range(number * tensor_parallel, (number + 1) * tensor_parallel))
        if tensor_parallel > 1:
            group = distributed.new_group(ranks)
            if isinstance(group, distributed.ProcessGroup):  # which it is where this rank is in it
                tensor = TensorParallel(group, own, tensor_parallel)
    everyone = distributed.new_group(list(range(found)))
    assert isinstance(everyone, distributed.ProcessGroup)
    return RankInfo(rank, found, stage, pipeline_parallel, tensor, everyone), device


def own_part(
    rank_info: RankInfo,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    name: str,
    whole: Tensor,
) -> Tensor | None:
    """What this process needs of a tensor of any shape, or None.

    Embedding and final norm are on every stage: exits may be tied to the one, and the other is
    small. The output layer is where the final head is, and where exits share it. A
    multi-token-prediction module is on the last stage, whose hidden states it begins with.
    """
    layers = rank_info.layers(architecture.num_layers)
    if name.startswith(_LAYERS):
        if int(name.removeprefix(_LAYERS).partition(".")[0]) not in layers:
            return None
    elif name.startswith(_EXITS):
        if int(name.removeprefix(_EXITS).partition(".")[0]) - 1 not in layers:
            return None
    elif name.startswith(_MTP) and not rank_info.is_last_stage:
        return None
    elif name.startswith("output_layer.") and not rank_info.is_last_stage:
        has_exits = bool(rank_info.exits(architecture.num_layers, early_exit))
        if not (early_exit.share_final_head and has_exits):
            return None
    if rank_info.tensor is not None:
        return rank_info.tensor.weight(name, whole, architecture.gated_linear_unit)
    # A copy, because it may be one of many layers in one tensor.
    return whole.clone()


def stage_as_model(
    rank_info: RankInfo,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    weights: Mapping[str, Tensor],
) -> tuple[Architecture, EarlyExitConfig, Weights]:
    """This process's part of the whole backbone and all exits as a model of its own, whose first
    layer is the stage's first; `weights` is what `own_part` has left, matrices [outputs, inputs]
    and vectors [entries]."""
    layers = rank_info.layers(architecture.num_layers)
    own_exits = rank_info.exits(architecture.num_layers, early_exit)
    positions = [early_exit.positions[index] - layers.start for index in own_exits]
    exits = EarlyExitConfig()
    if positions:
        exits = EarlyExitConfig(exit_layer_nums=tuple(positions), **early_exit.head_options)
    own = architecture if rank_info.tensor is None else rank_info.tensor.architecture(architecture)
    renamed = {_renumbered(name, layers.start): tensor for name, tensor in weights.items()}
    depths = own.mtp_num_layers if rank_info.is_last_stage else 0
    return replace(own, num_layers=len(layers), mtp_num_layers=depths), exits, renamed


def _renumbered(name: str, first: int) -> str:
    for prefix in (_LAYERS, _EXITS):
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{int(number) - first}.{rest}"
    return name
