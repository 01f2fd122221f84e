"""Adds exits to a model, and removes them.

The modules of a new exit are copies of the model's own modules, so that even before tuning, an exit
after the last layer gives the model's own predictions (EE-Tuning, arXiv 2402.00518); or they are
initialised at random, as Megatron initialises a model before training.
"""

import hashlib
import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.base import is_of_exit
from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import HEAD_PARTS, EarlyExitConfig, Exit

RANDOM = "random"
"""The entry of `Conversion.sources` for tensors that are initialised at random."""
INITIAL = "initial value"
"""The entry of `Conversion.sources` for tensors with constant initial values."""

_WORD_EMBEDDING, _OUTPUT_LAYER = "embedding.word_embeddings", "output_layer"
_ENDS_OF_BRANCHES = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True, slots=True)
class RandomInit:
    """The random initialisation of what is added to a model.

    Attributes:
        seed: the same seed gives the same weights.
        std: standard deviation of matrices; `--init-method-std`.
    """

    seed: int
    std: float = 0.02

    def draw(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, architecture: Architecture
    ) -> Tensor:
        """The tensor `name`, of any shape, as Megatron initialises a model's."""
        if len(shape) == 1:
            is_one = name.endswith("weight") and not architecture.layernorm_zero_centered_gamma
            return torch.full(shape, 1.0 if is_one else 0.0, dtype=dtype)
        std = self.std
        if name.endswith(_ENDS_OF_BRANCHES):
            std /= math.sqrt(2 * architecture.num_layers)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], signed=True))
        return (torch.randn(shape, generator=generator) * std).to(dtype)


def add_exits(
    source: Conversion, wanted: EarlyExitConfig, random_init: RandomInit | None = None
) -> Conversion:
    """The model with more exits.

    Args:
        source: a model; its exits are kept, except at the positions of new ones.
        wanted: the new exits.
        random_init: None copies the model's own modules: the final norm, the output layer (or the
            word embedding, if they are tied), the MLP of the layer that the exit follows, and the
            layer after the exit (the last layer, if there is none after it).

    Raises:
        ValueError: the exits do not fit the model or those that it has, or have no weights that
            could be initialised at random.
    """
    if wanted.share_final_head and random_init is not None:
        raise ValueError(
            "--random-init has no effect with --share-final-head: exits have no matrices then"
        )
    architecture = source.description.architecture
    assert architecture is not None
    wanted.validate(architecture.num_layers, architecture.vocab_size)
    early_exit = _joined(source.description.early_exit, wanted, architecture.num_layers)
    weights, sources = {}, {}
    for name, shape in weight_shapes(architecture, early_exit).items():
        position = int(name.split(".")[1]) if is_of_exit(name) else None
        if position not in wanted.positions:
            weights[name], sources[name] = source.weights[name], source.sources[name]
            continue
        _, _, module, rest = name.split(".", 3)
        part = next(one for one in HEAD_PARTS if one.module == module)
        if part.origin is None:
            dtype = source.weights[f"{_WORD_EMBEDDING}.weight"].dtype
            fill = partial(torch.full, shape, part.initial, dtype=dtype)
            weights[name], sources[name] = LazyTensor(shape, dtype, fill), (INITIAL,)
            continue
        assert position is not None
        origin = f"{part.origin.format(**_modules(position, architecture))}.{rest}"
        model = source.weights[origin]
        if random_init is None:
            weights[name], sources[name] = model, (origin,)
        else:
            draw = partial(random_init.draw, name, shape, model.dtype, architecture)
            weights[name], sources[name] = LazyTensor(shape, model.dtype, draw), (RANDOM,)
    return source.remade(
        replace(source.description, early_exit=early_exit, rule=None), weights, sources
    )


def strip_exits(source: Conversion) -> Conversion:
    """The model without its exits.

    Raises:
        ValueError: it has none.
    """
    if not source.description.early_exit.exits:
        raise ValueError("the model has no exits")
    weights = {name: tensor for name, tensor in source.weights.items() if not is_of_exit(name)}
    sources = {name: source.sources[name] for name in weights}
    return source.remade(
        replace(source.description, early_exit=EarlyExitConfig(), rule=None), weights, sources
    )


def _joined(old: EarlyExitConfig, new: EarlyExitConfig, num_layers: int) -> EarlyExitConfig:
    """One configuration with the old exits and the new ones, with the placement and the measure of
    confidence of the new ones."""
    kept = [one for one in old.exits if one.position not in new.positions]
    if not kept:
        return new
    if old.head_flags != new.head_flags:
        raise ValueError(
            f"the model has exits with {old.head_flags} and the new ones have {new.head_flags}, "
            "allowed: the same flags, or new exits in place of all that the model has"
        )
    if new.pre_exit and kept[-1].position == num_layers:
        raise ValueError(
            f"--pre-exit is not possible: the model has an exit after its last layer {num_layers}"
        )
    exits: list[Exit] = sorted((*kept, *new.exits), key=lambda one: one.position)
    shift = 1 if new.pre_exit else 0
    per_exit = {
        "exit_layer_nums": tuple(one.position + shift for one in exits),
        "exit_layer_weight": tuple(one.weight for one in exits),
        "exit_layer_weight_init": tuple(one.weight_init for one in exits),
        "exit_layer_temperature": tuple(one.temperature for one in exits),
    }
    common = {f.name: getattr(old, f.name) for f in fields(EarlyExitConfig)}
    of_new = {"pre_exit": new.pre_exit, "exit_measure": new.exit_measure}
    return EarlyExitConfig(**{**common, **per_exit, **of_new})


def _modules(position: int, architecture: Architecture) -> dict[str, Any]:
    """The values of the placeholders in `HeadPart.origin`."""
    is_tied = architecture.share_embeddings_and_output_weights
    return {
        "layer": position - 1,
        "next_layer": min(position, architecture.num_layers - 1),
        "output": _WORD_EMBEDDING if is_tied else _OUTPUT_LAYER,
    }
