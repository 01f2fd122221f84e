"""The model that heads are tuned on: read from its checkpoint into this rank's part of it.

Megatron loads checkpoints of the model that it saves. In EE-Tuning (arXiv 2402.00518) those are
two: what is saved are the heads, and what is built of the base ends with the last of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.checkpoint.base import BaseReference, is_of_exit
from megatron.early_exit.checkpoint.exits import RandomInit, add_exits, strip_exits
from megatron.early_exit.checkpoint.lazy import LazyWeights
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.multi_token_prediction import add_mtp
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.checkpoint.weights import LAYERS, MTP_LAYERS, VOCABULARY_ENDINGS
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.backbone_parts import OUTPUT_LAYER, WORD_EMBEDDING
from megatron.early_exit.model.gpt_model import TUNING_ANCHOR, EarlyExitGPTModel

_EXITS = "exits."
_BLOCK = "block."
_MTP_INNER, _MTP_STORED = "mtp_model_layer.", "transformer_layer."


def describe_base(path: Path, tunes_mtp: bool) -> BaseReference:
    """Name a checkpoint as the base of heads; reads all of its backbone.

    Args:
        path: the checkpoint.
        tunes_mtp: a look-ahead head is tuned.

    Raises:
        ValueError: it cannot be read, or is of a kind that is not known.
    """
    location = locate(path)
    return BaseReference.of(location, open_checkpoint(path).weights, tunes_mtp)


def starting_weights(
    base: BaseReference,
    exits: EarlyExitConfig,
    random_init: RandomInit | None,
    mtp_num_layers: int = 0,
    mtp_use_repeated_layer: bool = False,
) -> LazyWeights:
    """What tuning starts from: the base, its heads where it has them, and new ones where not.

    Args:
        base: the checkpoint; what is read of its backbone is compared with the hashes.
        exits: those of the run; where the base has one of them, it has the same head.
        random_init: see `add_exits`.
        mtp_num_layers: how far the look-ahead head that is tuned looks, 0 without one.
        mtp_use_repeated_layer: one layer does.

    Raises:
        ValueError: the base cannot be read, or its look-ahead head has more layers.
    """
    source = open_checkpoint(base.path)
    plain = strip_exits(source) if source.description.early_exit.exits else source
    if mtp_num_layers:
        plain = add_mtp(plain, mtp_num_layers, mtp_use_repeated_layer, random_init)
    started = add_exits(plain, exits, random_init).weights
    own = {n: t for n, t in source.weights.items() if is_of_exit(n) and n in started}
    return base.checked({**started, **own})


def load_base(chunk: EarlyExitGPTModel, weights: LazyWeights) -> None:
    """Read every weight of a part of a model.

    Args:
        chunk: the part; of weights that tensor parallelism divides it takes this rank's.
        weights: of the whole model.

    Raises:
        ValueError: one is missing, cannot be read, or has another shape.
    """
    tp_group = chunk.pg_collection.tp
    rank, size = torch.distributed.get_rank(tp_group), torch.distributed.get_world_size(tp_group)
    for name, parameter in _named_weights(chunk):
        if name not in weights:
            raise ValueError(f"the base has no tensor {name}, which the flags of this run ask for")
        whole = weights[name].read()
        if name.endswith(VOCABULARY_ENDINGS):
            whole = _padded(whole, parameter, size)
        part = _part(whole, parameter, rank, size)
        if part.shape != parameter.shape:
            raise ValueError(
                f"{name} has the shape {tuple(whole.shape)} in the base, and the flags of this "
                f"run want {tuple(parameter.shape)} of it on each of {size} ranks"
            )
        with torch.no_grad():
            parameter.copy_(part)


def _padded(whole: Tensor, parameter: Tensor, size: int) -> Tensor:
    """A matrix with the rows of zeros that a run has behind the vocabulary."""
    missing = len(parameter) * size - len(whole)
    return functional.pad(whole, (0, 0, 0, max(missing, 0)))


def _part(whole: Tensor, parameter: Any, rank: int, size: int) -> Tensor:
    """This rank's part, where it fits."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride
    if whole.shape[dim] != parameter.shape[dim] * size:
        return whole
    blocks = whole.unflatten(dim, (stride, size, -1))
    return blocks.select(dim + 1, rank).flatten(dim, dim + 1)


def _named_weights(chunk: EarlyExitGPTModel) -> Iterator[tuple[str, Tensor]]:
    """The chunk's parameters by the names of `weight_shapes`."""
    originals = {id(copy): name for name, copy in chunk.exits.backbone.copies.items()}
    for name, parameter in chunk.named_parameters():
        if name == TUNING_ANCHOR:
            continue
        if id(parameter) in originals:
            yield originals[id(parameter)], parameter
        elif name == OUTPUT_LAYER and chunk.share_embeddings_and_output_weights:
            # On a stage without the embedding it is tied to.
            yield WORD_EMBEDDING, parameter
        elif name.startswith(LAYERS):
            number, _, rest = name.removeprefix(LAYERS).partition(".")
            layer: Any = chunk.decoder.layers[int(number)]
            keys = layer.submodules_config.sharded_state_dict_keys_map
            yield f"{LAYERS}{layer.layer_number - 1}.{_renamed(rest, keys)}", parameter
        elif name.startswith(MTP_LAYERS):
            number, _, rest = name.removeprefix(MTP_LAYERS).partition(".")
            inner: Any = chunk.mtp.layers[int(number)].mtp_model_layer
            keys = inner.submodules_config.sharded_state_dict_keys_map
            own = _renamed(rest.removeprefix(_MTP_INNER), keys)
            stored = f"{_MTP_STORED}{own}" if rest.startswith(_MTP_INNER) else rest
            yield f"{MTP_LAYERS}{number}.{stored}", parameter
        elif name.startswith(_EXITS):
            position, _, rest = name.removeprefix(_EXITS).partition(".")
            keys = chunk.exits.heads[int(position)].key_map
            block = _BLOCK if rest.startswith(_BLOCK) else ""
            own = _renamed(rest.removeprefix(block), keys)
            yield f"{_EXITS}{position}.{block}{own}", parameter
        else:
            yield name, parameter


def _renamed(name: str, keys: dict[str, str]) -> str:
    for old, new in keys.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
