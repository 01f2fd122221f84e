"""A checkpoint of EE-LLM (arXiv 2312.04916), of any tensor and pipeline parallelism, as a
conversion."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.ee_llm.arguments import (
    architecture_of,
    exits_of,
    has_idle_branches,
    tokenizer_of,
)
from megatron.early_exit.checkpoint.ee_llm.files import RankFile, find_iteration, load_ranks
from megatron.early_exit.checkpoint.ee_llm.names import (
    ENCODER_LAYERS,
    EXIT_PROJECTION,
    Join,
    ee_llm_name,
    join_of,
)
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.weights import VOCABULARY_ENDINGS, weight_shapes

_LAYER = re.compile(r"(?<=^encoder\.layers\.)\d+")

Parts = list[Tensor]
"""One tensor's parts on the tensor-parallel ranks, in order."""


def import_ee_llm(
    source: str | Path,
    tokenizer_model: str | Path | None = None,
    tokenizer_type: str | None = None,
) -> Conversion:
    """The model in a checkpoint of EE-LLM, without the state of its training.

    Args:
        source: a save directory, or the folder of one iteration.
        tokenizer_model: the tokenizer's file or folder; None is the one that the checkpoint's
            arguments name.
        tokenizer_type: a value of `--tokenizer-type`; None is the checkpoint's.

    Raises:
        ValueError: a file is missing or damaged, the tokenizer is another one, or the tensors are
            not those of the model that the arguments describe.
        UnsupportedArchitecture: the model is of a kind that cannot be imported.
    """
    iteration_dir = find_iteration(Path(source))
    stages = load_ranks(iteration_dir)
    args = stages[0][0].args
    early_exit = exits_of(args)
    tokenizer, vocab_size = tokenizer_of(args, tokenizer_model, tokenizer_type)
    architecture = architecture_of(args, vocab_size)
    early_exit.validate(architecture.num_layers)
    label = f"checkpoint {iteration_dir}"
    if has_idle_branches(args):
        for rank in (rank for ranks in stages for rank in ranks):
            rank.drop_branches()
    found = _whole_names(stages, list(args.exit_layer_nums or ()) if early_exit.exits else [])
    weights, sources = {}, {}
    for name, shape in weight_shapes(architecture, early_exit).items():
        their_name = ee_llm_name(name, early_exit)
        if their_name not in found:
            raise ValueError(f"{label}: has no tensor {their_name}")
        join = join_of(their_name, architecture.gated_linear_unit)
        rows = vocab_size if name.endswith(VOCABULARY_ENDINGS) else None
        weights[name] = _lazy(label, their_name, found[their_name], join, shape, rows)
        sources[name] = (their_name,)
    left = sorted(found.keys() - {one for names in sources.values() for one in names})
    if left:
        others = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise ValueError(
            f"{label}: holds {left[0]}{others}, which the model of its args does not have"
        )
    return Conversion(ModelDescription(architecture, early_exit, tokenizer), weights, sources)


def _whole_names(stages: Sequence[Sequence[RankFile]], exit_layers: list[int]) -> dict[str, Parts]:
    """All tensors under the names that they would have on one stage, exits' projections by the
    number of their layer."""
    found: dict[str, Parts] = {}
    first_layer = 0
    for ranks in stages:
        names = ranks[0].tensors
        layers = {int(match[0]) for name in names if (match := _LAYER.search(_modern(name)))}
        num_layers = max(layers, default=-1) + 1
        # In the order in which they were given, which need not be ascending.
        own_exits = [n for n in exit_layers if first_layer < n <= first_layer + num_layers]
        for name in names:
            if any(name not in rank.tensors for rank in ranks):
                raise ValueError(f"{ranks[-1].path}: lacks {name}, which {ranks[0].path} has")
            whole = _whole_name(_modern(name), first_layer, own_exits)
            found[whole] = [rank.tensors[name] for rank in ranks]
        first_layer += num_layers
    return found


def _modern(name: str) -> str:
    """Rename norms, whose names contained `layernorm` until the middle of 2023."""
    return name.replace("layernorm", "norm")


def _whole_name(name: str, first_layer: int, own_exits: list[int]) -> str:
    if name.startswith(ENCODER_LAYERS):
        return _LAYER.sub(lambda match: str(int(match[0]) + first_layer), name)
    if name.startswith(EXIT_PROJECTION):
        place, _, rest = name.removeprefix(EXIT_PROJECTION).partition(".")
        if place.isdigit() and int(place) < len(own_exits):
            return f"{EXIT_PROJECTION}{own_exits[int(place)]}.{rest}"
    return name


def _lazy(
    label: str, name: str, parts: Parts, join: Join, shape: tuple[int, ...], rows: int | None
) -> LazyTensor:
    """The parts put together, without the vocabulary's padding.

    Raises:
        ValueError: that has another shape.
    """
    try:
        # The shapes alone.
        joined = join([torch.empty_like(part, device="meta") for part in parts])
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = [list(part.shape) for part in parts]
        raise ValueError(f"{label}: the parts of {name} do not fit together: {shapes}") from error
    found = tuple(joined[:rows].shape)
    if found != shape:
        raise ValueError(f"{label}: {name} has the shape {found}, its args want {shape}")
    return LazyTensor(shape, parts[0].dtype, lambda: join(parts)[:rows])
