"""The flags that say which layers each stage of a given layout has, with Megatron's names."""

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from dataclasses import dataclass

from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.planner.command_line.layout_notation import LAYOUT_FLAG, parse_layout
from megatron.early_exit.ranges import ONE_OR_MORE

_PER_CHUNK = "--num-layers-per-virtual-pipeline-stage"
_CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_PIPELINE = "--pipeline-model-parallel-size"


@dataclass(frozen=True, kw_only=True)
class GivenStages:
    """What flags say of the stages.

    Attributes:
        num_chunks: of each rank; None if it is open.
        layers_per_stage: in the order of the stages; None if they are open.
    """

    num_chunks: int | None
    layers_per_stage: tuple[int, ...] | None


def add_stage_flags(group: "ArgumentParser | _ArgumentGroup") -> None:
    """Add the flags to the group of a layout's."""
    add = group.add_argument
    add(_CHUNKS, type=int, help="1 is not interleaved")
    layers = f"layers of each stage, in place of {_CHUNKS}; as Megatron's flag"
    add(_PER_CHUNK, type=int, help=layers)
    add(LAYOUT_FLAG, metavar="LAYOUT", help="layers of the stages; as Megatron's flag, without m")
    mapping = "plan this order of the ranks only (default: the better); as Megatron's flag"
    add("--use-tp-pp-dp-mapping", action="store_true", help=mapping)


def read_stages(args: Namespace, num_layers: int) -> GivenStages:
    """The stages that the flags describe.

    Args:
        args: parsed arguments.
        num_layers: of the model.

    Raises:
        ValueError: a flag cannot be read, is out of range, or contradicts another.
    """
    ranks, chunks = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    per_chunk, layout = (
        args.num_layers_per_virtual_pipeline_stage,
        args.pipeline_model_parallel_layout,
    )
    ONE_OR_MORE.check(**{_PIPELINE: ranks, _CHUNKS: chunks, _PER_CHUNK: per_chunk})
    given = {_CHUNKS: chunks, _PER_CHUNK: per_chunk, LAYOUT_FLAG: layout}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{names[0]} {given[names[0]]} cannot be combined with {names[1]}")
    for name in (_PER_CHUNK, LAYOUT_FLAG):
        if name in names and ranks is None:
            raise ValueError(f"{name} {given[name]} needs {_PIPELINE}, which is missing")
    if per_chunk is not None:
        if num_layers % (ranks * per_chunk):
            allowed = f"numbers of which {_PIPELINE} {ranks} stages divide {num_layers} layers"
            raise out_of_range(_PER_CHUNK, per_chunk, allowed)
        return GivenStages(num_chunks=num_layers // (ranks * per_chunk), layers_per_stage=None)
    if layout is None:
        return GivenStages(num_chunks=chunks, layers_per_stage=None)
    layers = parse_layout(layout)
    if len(layers) % ranks:
        problem = f"has {len(layers)} stages"
        raise FieldError(LAYOUT_FLAG, problem, f"multiples of {_PIPELINE} {ranks}", value=layout)
    if sum(layers) != num_layers:
        problem = f"has {sum(layers)} layers"
        raise FieldError(LAYOUT_FLAG, problem, f"the {num_layers} of the model", value=layout)
    return GivenStages(num_chunks=len(layers) // ranks, layers_per_stage=layers)
