"""The model's tensors, under one set of names whatever wrote the checkpoint.

Names are Megatron's, with the layer number spelled out (`decoder.layers.0.mlp.linear_fc2.weight`);
exits are `exits.{position}.`. Shapes: h hidden size, f MLP size, np and ng query heads and groups,
hn head size, v vocabulary size.

- `linear_qkv.weight` is [ng * (np / ng + 2) * hn, h]: per group its queries, its key, its value;
- `linear_fc1.weight` of a gated MLP is [2 f, h]: gate rows, then the rows they gate.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.config import EarlyExitConfig

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]

_LAYERS = "decoder.layers."
_VOCABULARY_ENDINGS = ("word_embeddings.weight", "output_layer.weight", "projection.weight")


def weight_shapes(architecture: Architecture, early_exit: EarlyExitConfig) -> Shapes:
    """Name and shape of every tensor that a model consists of.

    Matrices over the vocabulary are listed without padding.
    """
    a = architecture
    vocabulary = (a.vocab_size, a.hidden_size)
    shapes: Shapes = {"embedding.word_embeddings.weight": vocabulary}
    if a.position_embedding_type == "learned_absolute":
        positions = (a.max_position_embeddings, a.hidden_size)
        shapes["embedding.position_embeddings.weight"] = positions
    for layer in range(a.num_layers):
        shapes |= _layer(a, f"{_LAYERS}{layer}.")
    shapes |= _norm(a, "decoder.final_layernorm.", a.hidden_size)
    if not a.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = vocabulary
    for position in early_exit.positions:
        prefix = f"exits.{position}."
        if early_exit.use_exit_mlp:
            shapes |= _mlp(a, f"{prefix}mlp.")
        if early_exit.use_exit_block:
            shapes |= _layer(a, f"{prefix}block.")
        if early_exit.use_exit_norm:
            shapes |= _norm(a, f"{prefix}norm.", a.hidden_size)
        if early_exit.untie_exit_output_weights:
            shapes[f"{prefix}projection.weight"] = vocabulary
    return shapes


def _norm(a: Architecture, prefix: str, size: int) -> Shapes:
    shapes: Shapes = {f"{prefix}weight": (size,)}
    if a.normalization == "LayerNorm":
        shapes[f"{prefix}bias"] = (size,)
    return shapes


def _linear(prefix: str, outputs: int, inputs: int, has_bias: bool) -> Shapes:
    shapes: Shapes = {f"{prefix}weight": (outputs, inputs)}
    if has_bias:
        shapes[f"{prefix}bias"] = (outputs,)
    return shapes


def _layer(a: Architecture, prefix: str) -> Shapes:
    attention = f"{prefix}self_attention."
    queries = a.num_attention_heads * a.kv_channels
    keys_and_values = 2 * a.num_query_groups * a.kv_channels
    shapes = _norm(a, f"{attention}linear_qkv.layer_norm_", a.hidden_size)
    shapes |= _linear(
        f"{attention}linear_qkv.", queries + keys_and_values, a.hidden_size, a.qkv_bias
    )
    if a.qk_layernorm:
        shapes |= _norm(a, f"{attention}q_layernorm.", a.kv_channels)
        shapes |= _norm(a, f"{attention}k_layernorm.", a.kv_channels)
    shapes |= _linear(f"{attention}linear_proj.", a.hidden_size, queries, a.add_bias_linear)
    return shapes | _mlp(a, f"{prefix}mlp.")


def _mlp(a: Architecture, prefix: str) -> Shapes:
    inner = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    shapes = _norm(a, f"{prefix}linear_fc1.layer_norm_", a.hidden_size)
    shapes |= _linear(f"{prefix}linear_fc1.", inner, a.hidden_size, a.add_bias_linear)
    shapes |= _linear(f"{prefix}linear_fc2.", a.hidden_size, a.ffn_hidden_size, a.add_bias_linear)
    return shapes


def load_weights(
    reader: CheckpointReader,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    dtype: torch.dtype,
    device: torch.device,
    part: Callable[[str, Tensor], Tensor | None] | None = None,
) -> Weights:
    """Read the tensors of `weight_shapes`, one at a time, leaving padding of the vocabulary behind.

    Args:
        part: gives what is wanted of a tensor, by its name, or None; by default all is.

    Raises:
        ValueError: a tensor is missing, has another shape, or cannot be read.
    """
    weights: Weights = {}
    seen = set()
    for name, shape in weight_shapes(architecture, early_exit).items():
        if name in seen:
            continue
        for found, tensor in _read(reader, name, architecture.num_layers):
            seen.add(found)
            if name.endswith(_VOCABULARY_ENDINGS) and tensor.shape[0] >= shape[0]:
                tensor = tensor[: shape[0]]
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"checkpoint {reader.path}: {found} has the shape {tuple(tensor.shape)}, "
                    f"the model's description wants {shape}"
                )
            wanted = tensor if part is None else part(found, tensor)
            if wanted is not None:
                weights[found] = wanted.to(device=device, dtype=dtype)
    return weights


def _read(reader: CheckpointReader, name: str, num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """The tensor `name`, or that of every layer where the checkpoint stacks them."""
    if name in reader.tensors:
        yield name, reader.read(name)
        return
    halves = (f"{name}_w", f"{name}_v")
    if all(half in reader.tensors for half in halves):
        yield name, torch.cat([reader.read(half) for half in halves])
        return
    rest = name.removeprefix(_LAYERS).partition(".")[2]
    stacked = f"{_LAYERS}{rest}"
    if name.startswith(_LAYERS) and stacked in reader.tensors:
        tensor = reader.read(stacked)
        if len(tensor) != num_layers:
            raise ValueError(
                f"checkpoint {reader.path}: has {len(tensor)} layers, the model's description "
                f"wants {num_layers}"
            )
        for layer in range(num_layers):
            yield f"{_LAYERS}{layer}.{rest}", tensor[layer]
        return
    raise ValueError(f"checkpoint {reader.path}: has no tensor {name}")
