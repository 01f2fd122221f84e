"""Adds Megatron's multi-token-prediction module to a model, and removes it.

Its layer k combines the final hidden state of a token with the embedding of the token k places
later (DeepSeek-V3, arXiv 2412.19437); what it predicts are drafts for speculative decoding. A new
layer starts where tuning has the least to learn: a copy of the model's last layer gets what it is
used to, the residual stream (the hidden state, of which the gain of the final norm is taken back),
and reads nothing of the embedding yet.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.base import is_of_mtp
from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.exits import INITIAL, RANDOM, RandomInit
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.weights import LAYERS, MTP_LAYERS, weight_shapes
from megatron.early_exit.errors import as_flag, out_of_range
from megatron.early_exit.ranges import ONE_OR_MORE

_FLAG = as_flag("mtp_num_layers")
_LAYER = "transformer_layer."
_FINAL_NORM = "final_layernorm."
_PROJECTION = "eh_proj.weight"
_HIDDEN_GAIN = "hnorm.weight"
_STREAM = 30.0
"""Root of the mean square of the residual stream that a new layer gets: what it is in front of the
last layer of SmolLM2-135M, which learned faster with it than with 10 or 1. Where it is too large,
the layer adds little to the final hidden state at first; where it is too small, little is left of
that.
"""
_LEAST_GAIN = 0.1
"""Smaller gains of the final norm, as a share of their mean, are not taken back wholly."""


def add_mtp(
    source: Conversion,
    num_layers: int,
    use_repeated_layer: bool = False,
    random_init: RandomInit | None = None,
) -> Conversion:
    """The model with a multi-token-prediction module, or with more layers in that which it has.

    Args:
        source: a model; layers of a module that it has are kept.
        num_layers: how many further tokens the module predicts; `--mtp-num-layers`.
        use_repeated_layer: one layer predicts all of them; `--mtp-use-repeated-layer`.
        random_init: how new layers are initialised at random. None copies the last layer of the
            module that the model has; where it has none, its last layer and its final norm.

    Raises:
        ValueError: `num_layers` is out of range, layers of the model's module would be lost, or
            Megatron builds no such module for the model.
    """
    ONE_OR_MORE.check(**{_FLAG: num_layers})
    old = source.description.architecture
    assert old is not None
    new = replace(old, mtp_num_layers=num_layers, mtp_use_repeated_layer=use_repeated_layer)
    kept = old.mtp_stored_layers
    if new.mtp_stored_layers < kept:
        known = f"{kept} or more, each with a layer of its own, as the model has so many layers"
        raise out_of_range(_FLAG, num_layers, known)
    dtype = source.weights[f"{LAYERS}{old.num_layers - 1}.mlp.linear_fc2.weight"].dtype
    weights, sources = dict(source.weights), dict(source.sources)
    for name, shape in weight_shapes(new, source.description.early_exit).items():
        if name in source.weights:
            continue
        rest = name.removeprefix(MTP_LAYERS).partition(".")[2]
        origin = _origin(rest, old)
        if random_init is not None:
            draw = partial(random_init.draw, name, shape, dtype, old)
            weights[name], sources[name] = LazyTensor(shape, dtype, draw), (RANDOM,)
        elif origin is not None and rest == _HIDDEN_GAIN and not old.mtp_stored_layers:
            fill = partial(_taken_back, source.weights[origin], old)
            weights[name], sources[name] = LazyTensor(shape, dtype, fill), (origin,)
        elif origin is not None:
            weights[name], sources[name] = source.weights[origin], (origin,)
        else:
            fill = partial(_initial, rest, shape, dtype, old)
            weights[name], sources[name] = LazyTensor(shape, dtype, fill), (INITIAL,)
    return source.remade(replace(source.description, architecture=new), weights, sources)


def strip_mtp(source: Conversion) -> Conversion:
    """The model without its multi-token-prediction module.

    Raises:
        ValueError: it has none.
    """
    old = source.description.architecture
    assert old is not None
    if not old.mtp_num_layers:
        raise ValueError("the model has no multi-token-prediction module")
    new = replace(old, mtp_num_layers=0, mtp_use_repeated_layer=False)
    weights = {name: tensor for name, tensor in source.weights.items() if not is_of_mtp(name)}
    sources = {name: source.sources[name] for name in weights}
    return source.remade(replace(source.description, architecture=new), weights, sources)


def _origin(rest: str, a: Architecture) -> str | None:
    """The tensor that a new layer's tensor `rest` is a copy of; None where it has an initial
    value."""
    if a.mtp_stored_layers:
        return f"{MTP_LAYERS}{a.mtp_stored_layers - 1}.{rest}"
    if rest.startswith(_LAYER):
        return f"{LAYERS}{a.num_layers - 1}.{rest.removeprefix(_LAYER)}"
    if rest == _HIDDEN_GAIN:
        return f"decoder.{_FINAL_NORM}weight"
    return f"decoder.{rest}" if rest.startswith(_FINAL_NORM) else None


def _taken_back(final_gain: LazyTensor, a: Architecture) -> Tensor:
    """The gain with which a norm of the final norm's output gives the stream in front of it, with
    about `_STREAM` as root of the mean square."""
    stored = final_gain.read()
    shift = 1.0 if a.layernorm_zero_centered_gamma else 0.0
    gain = stored.double() + shift
    mean = gain.abs().mean()
    # Only the gains' ratios matter; where all are 0, nothing is to be taken back.
    gain = gain / mean if mean > 0 else torch.ones_like(gain)
    inverse = gain.abs().clamp(min=_LEAST_GAIN).reciprocal().copysign(gain)
    scale = _STREAM * gain.square().mean().sqrt()
    return (scale * inverse - shift).to(stored.dtype)


def _initial(rest: str, shape: tuple[int, ...], dtype: torch.dtype, a: Architecture) -> Tensor:
    if rest == _PROJECTION:
        # [embedding, hidden state]
        embedding, hidden = torch.zeros(shape[0], shape[0]), torch.eye(shape[0])
        return torch.cat((embedding, hidden), dim=1).to(dtype)
    is_one = rest.endswith("weight") and not a.layernorm_zero_centered_gamma
    return torch.full(shape, 1.0 if is_one else 0.0, dtype=dtype)
