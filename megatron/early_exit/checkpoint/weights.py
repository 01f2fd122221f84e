"""The model's tensors, under the same names whatever wrote the checkpoint.

Names are Megatron's, with the layer number spelled out (`decoder.layers.0.mlp.linear_fc2.weight`);
exits are `exits.{position}.`, and layers of the multi-token-prediction module are
`mtp.layers.{number}.`. Shapes: h hidden size, f MLP size, np and ng query heads and groups, hn head
size, v vocabulary size.

- `linear_qkv.weight` is [ng * (np / ng + 2) * hn, h]: per group its queries, its key, its value;
- `linear_fc1.weight` of a gated MLP is [2 f, h]: gate rows, then the rows they gate.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.lazy import LazyTensor, LazyWeights
from megatron.early_exit.checkpoint.location import CheckpointLocation
from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.config import EarlyExitConfig, HeadPart

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]

LAYERS = "decoder.layers."
MTP_LAYERS = "mtp.layers."
_SILENCE_S = 2.0
"""Seconds without a line in the log while weights are read."""
_LOG = logging.getLogger(__name__)
VOCABULARY_ENDINGS = ("word_embeddings.weight", "output_layer.weight", "projection.weight")


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
        shapes |= _layer(a, f"{LAYERS}{layer}.")
    shapes |= _norm(a, "decoder.final_layernorm.", a.hidden_size)
    if not a.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = vocabulary
    for layer in range(a.mtp_stored_layers):
        shapes |= _mtp_layer(a, f"{MTP_LAYERS}{layer}.")
    for position in early_exit.positions:
        for part in early_exit.head_parts:
            shapes |= _head_part(a, part, f"exits.{position}.{part.module}.")
    return shapes


def _head_part(a: Architecture, part: HeadPart, prefix: str) -> Shapes:
    match part.tensors:
        case "mlp":
            return _mlp(a, prefix)
        case "layer":
            return _layer(a, prefix)
        case "norm":
            return _norm(a, prefix, a.hidden_size)
        case "output":
            return _linear(prefix, a.vocab_size, a.hidden_size, has_bias=False)
        case _:
            return {f"{prefix}{name}": shape for name, shape in part.own_shapes(a).items()}


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


def _mtp_layer(a: Architecture, prefix: str) -> Shapes:
    shapes = _norm(a, f"{prefix}enorm.", a.hidden_size)
    shapes |= _norm(a, f"{prefix}hnorm.", a.hidden_size)
    shapes |= _linear(f"{prefix}eh_proj.", a.hidden_size, 2 * a.hidden_size, has_bias=False)
    shapes |= _layer(a, f"{prefix}transformer_layer.")
    return shapes | _norm(a, f"{prefix}final_layernorm.", a.hidden_size)


def _mlp(a: Architecture, prefix: str) -> Shapes:
    inner = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    shapes = _norm(a, f"{prefix}linear_fc1.layer_norm_", a.hidden_size)
    shapes |= _linear(f"{prefix}linear_fc1.", inner, a.hidden_size, a.add_bias_linear)
    shapes |= _linear(f"{prefix}linear_fc2.", a.hidden_size, a.ffn_hidden_size, a.add_bias_linear)
    return shapes


def load_weights(
    tensors: LazyWeights,
    dtype: torch.dtype,
    device: torch.device,
    part: Callable[[str, Tensor], Tensor | None] | None = None,
    keep: Callable[[str, Tensor], dict[str, Tensor]] | None = None,
) -> Weights:
    """Read tensors of any shape, one at a time.

    Args:
        part: returns the wanted part of a tensor, by its name, or None to skip it; by default the
            whole tensor is read.
        keep: returns what is kept of a whole tensor, by names, in formats that stay as they are; by
            default it is the tensor in `dtype`.

    Raises:
        ValueError: one cannot be read.
    """
    weights: Weights = {}
    next_word = monotonic() + _SILENCE_S
    for number, (name, lazy) in enumerate(tensors.items()):
        if monotonic() > next_word:
            next_word = monotonic() + _SILENCE_S
            _LOG.info("read %d of %d tensors", number, len(tensors))
        tensor = lazy.read()
        kept = {name: tensor} if keep is None else keep(name, tensor)
        for own_name, whole in kept.items():
            wanted = whole if part is None else part(own_name, whole)
            if wanted is not None:
                own_dtype = dtype if keep is None else wanted.dtype
                weights[own_name] = wanted.to(device=device, dtype=own_dtype)
    return weights


def stored_weights(
    reader: CheckpointReader,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    is_wanted: Callable[[str], bool] = lambda name: True,
    quantization: Quantization | None = None,
) -> LazyWeights:
    """The tensors of `weight_shapes` in a distributed checkpoint, without padding of the
    vocabulary.

    Args:
        is_wanted: selects tensors by their names.
        quantization: of the model; its scales are among the tensors.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    shapes = weight_shapes(architecture, early_exit)
    if quantization is not None:
        shapes = quantization.with_scales(shapes)
    return {
        name: _find(reader, name, shape, architecture.num_layers)
        for name, shape in shapes.items()
        if is_wanted(name)
    }


def _find(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], num_layers: int
) -> LazyTensor:
    """The tensor `name`, even if the checkpoint stacks the tensors of all layers, or stores the
    halves of a gated MLP separately."""
    halves = (f"{name}_w", f"{name}_v")
    if name not in reader.tensors and all(half in reader.tensors for half in halves):
        half_shape = (shape[0] // 2, *shape[1:])
        parts = [_find(reader, half, half_shape, num_layers) for half in halves]
        return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    entry, place = name, None
    if name not in reader.tensors and name.startswith(LAYERS):
        entry, place = f"{LAYERS}{rest}", int(layer)
    if entry not in reader.tensors:
        raise ValueError(f"checkpoint {reader.path}: has no tensor {name}")
    found = tuple(reader.shape(entry))
    if place is not None:
        depth, *own = found
        found = tuple(own)
        if depth != num_layers:
            raise ValueError(
                f"checkpoint {reader.path}: has {depth} layers, the model's description wants "
                f"{num_layers}"
            )
    rows = None
    if name.endswith(VOCABULARY_ENDINGS) and found[0] > shape[0]:
        rows, found = shape[0], (shape[0], *found[1:])
    if found != shape:
        raise ValueError(
            f"checkpoint {reader.path}: {name} has the shape {found}, "
            f"the model's description wants {shape}"
        )
    dtype = reader.tensors[entry].properties.dtype
    return LazyTensor(shape, dtype, lambda: reader.read(entry, place)[:rows])


def model_weights(
    location: CheckpointLocation, description: ModelDescription, takes_quantized: bool = False
) -> LazyWeights:
    """All tensors of a model; of an exits-only checkpoint, those of its base are among them.

    Args:
        location: of the checkpoint.
        description: of the model in it, with an architecture.
        takes_quantized: the caller knows what to do with matrices in 8 bits.

    Raises:
        ValueError: a tensor is missing or has another shape, or the base is not there; or matrices
            are in 8 bits. Reading one raises it where the base is another model than the exits
            were tuned on.
    """
    architecture, early_exit = description.architecture, description.early_exit
    assert architecture is not None
    if description.quantization is not None and not takes_quantized:
        raise quantized_refusal(location.iteration_dir)
    reader = CheckpointReader(location.iteration_dir)
    if description.base is None:
        return stored_weights(
            reader, architecture, early_exit, quantization=description.quantization
        )
    reference = description.base
    base = CheckpointReader(reference.find(location.save_dir).iteration_dir)
    backbone = stored_weights(
        base, architecture, EarlyExitConfig(), lambda name: not reference.lacks(name)
    )
    tuned = stored_weights(reader, architecture, early_exit, reference.lacks)
    return {**reference.checked(backbone), **tuned}


def quantized_refusal(path: Path) -> ValueError:
    """What is said where a checkpoint in 8 bits cannot be used."""
    return ValueError(
        f"checkpoint {path}: its matrices are in 8 bits, which only inference can use, allowed: "
        "the checkpoint that tools/checkpoint.py quantize made it of"
    )
