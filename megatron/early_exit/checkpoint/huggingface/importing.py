"""Imports a model from Hugging Face's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.huggingface.families import read_architecture
from megatron.early_exit.checkpoint.huggingface.gguf import GgufModel
from megatron.early_exit.checkpoint.huggingface.layouts import Shape
from megatron.early_exit.checkpoint.huggingface.shards import DTYPES, open_shards
from megatron.early_exit.checkpoint.huggingface.sources import locate_source
from megatron.early_exit.checkpoint.huggingface.tokenizers import find_tokenizer
from megatron.early_exit.checkpoint.huggingface.weight_map import BUFFER, Origin, origin
from megatron.early_exit.checkpoint.huggingface_config import CONFIG_NAME
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.text_files import read_json
from megatron.early_exit.checkpoint.weights import LAYERS, weight_shapes
from megatron.early_exit.config import EarlyExitConfig

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def import_hf(source: str | Path) -> Conversion:
    """Open a model of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3, and MiMo, arXiv
    2505.07608).

    Weights stay in their files, in the dtype that they are stored in, until the conversion is
    written. Those of a GGUF file are in memory instead, as fp32.

    Args:
        source: a folder with config.json and safetensors files; a GGUF file or a folder with just
            one; or, where there is no such path, the name of a model on the hub.

    Raises:
        ValueError: it cannot be found, is damaged or incomplete, holds tensors that are no part of
            the model, or the model is one that Megatron or inference cannot compute.
    """
    path = locate_source(source)
    if path.is_file():
        model = GgufModel(path)
        config, tensors, tokenizer_dir = model.config, model.tensors(), model.tokenizer_dir
    else:
        config, tensors, tokenizer_dir = read_json(path / CONFIG_NAME), open_shards(path), path
    try:
        stored = tensors[_EMBEDDING].dtype if _EMBEDDING in tensors else torch.float32
        architecture = read_architecture(config, stored)
        origins, weights = _match(architecture, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tokenizer = find_tokenizer(tokenizer_dir, config)
    description = ModelDescription(architecture, EarlyExitConfig(), tokenizer)
    return Conversion(description, weights, {name: one.names for name, one in origins.items()})


def _match(
    architecture: Architecture, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Origin], dict[str, LazyTensor]]:
    """What each of our tensors is made of, and the tensors; nothing may be left over."""
    shapes = weight_shapes(architecture, EarlyExitConfig())
    origins = {name: origin(name) for name in shapes}
    weights = {
        name: _join(architecture, tensors, origins[name], shape) for name, shape in shapes.items()
    }
    _check_layers(weights)
    used = {name for one in origins.values() for name in one.names}
    left_over = [name for name in tensors if name not in used and not BUFFER.fullmatch(name)]
    if architecture.share_embeddings_and_output_weights and _HEAD in left_over:
        left_over.remove(_HEAD)
        if not torch.equal(tensors[_HEAD].read(), tensors[_EMBEDDING].read()):
            raise ValueError(
                f"{_HEAD} differs from {_EMBEDDING} although tie_word_embeddings is on"
            )
    if left_over:
        raise ValueError(
            f"tensor {left_over[0]} does not belong to a model like the one in config.json"
        )
    return origins, weights


def _join(
    architecture: Architecture, tensors: Mapping[str, LazyTensor], made_of: Origin, shape: Shape
) -> LazyTensor:
    for name, wanted in zip(made_of.names, made_of.layout.shapes(architecture, shape), strict=True):
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        if tensors[name].shape != wanted:
            raise ValueError(
                f"tensor {name} has the shape {tensors[name].shape}, config.json wants {wanted}"
            )
    parts = [tensors[name] for name in made_of.names]
    if any(part.dtype not in DTYPES.values() for part in parts):
        raise ValueError(f"tensor {made_of.names[0]} has a dtype other than {', '.join(DTYPES)}")
    if any(part.dtype is not parts[0].dtype for part in parts):
        raise ValueError(
            f"tensors {', '.join(made_of.names)} differ in dtype, allowed: one for all"
        )

    def read() -> Tensor:
        return made_of.layout.join(architecture, [part.read() for part in parts])

    return LazyTensor(shape, parts[0].dtype, read)


def _check_layers(weights: Mapping[str, LazyTensor]) -> None:
    """Refuse layers with different dtypes: a checkpoint stacks their tensors in one, which has one
    dtype."""
    dtypes: dict[str, Any] = {}
    for name, tensor in weights.items():
        kind = name.removeprefix(LAYERS).partition(".")[2] if name.startswith(LAYERS) else name
        if dtypes.setdefault(kind, tensor.dtype) is not tensor.dtype:
            raise ValueError(f"layers differ in the dtype of {kind}, allowed: one for all")
