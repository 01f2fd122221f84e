"""Weights in safetensors files: one file, or several and an index of what is where."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.text_files import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that weights may have, by the format's names; buffers may have others."""


def open_shards(folder: Path) -> dict[str, LazyTensor]:
    """The tensors in a folder's safetensors files, by name.

    Raises:
        ValueError: there are none, one is missing or damaged, or the index is wrong.
    """
    found: dict[str, LazyTensor] = {}
    for shard, expected in _shards(folder).items():
        tensors = _open(folder / shard)
        missing = [name for name in expected if name not in tensors]
        if missing:
            raise ValueError(f"{folder / shard}: has no tensor {missing[0]}, which the index wants")
        found |= tensors
    return found


def _shards(folder: Path) -> dict[str, list[str]]:
    """The files to read, and what the index says of each."""
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: []}
    if not (folder / INDEX_NAME).is_file():
        alone = [path.name for path in folder.glob("*.safetensors")]
        if len(alone) == 1:
            return {alone[0]: []}
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" (it holds {pickled[0]}, which is not read)" if pickled else ""
        raise ValueError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    places = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX_NAME}: has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX_NAME}: {shard!r} is not the name of a file")
        if shard not in shards and not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing, and {INDEX_NAME} names it")
        shards.setdefault(shard, []).append(name)
    return shards


def _open(path: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                part = file.get_slice(name)
                # A dtype that is not among these is met when the tensor turns out to be a weight.
                dtype = DTYPES.get(part.get_dtype(), torch.uint8)
                tensors[name] = _lazy(path, name, tuple(part.get_shape()), dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error
    return tensors


def _lazy(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {name} cannot be read ({error})") from error
        return tensor

    return LazyTensor(shape, dtype, read)
