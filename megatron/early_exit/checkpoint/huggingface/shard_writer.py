"""Writing safetensors files one tensor at a time.

The format begins with a header that says where each tensor will be; nothing but that has to be
known before the first one is written. The library's own writer takes whole files from memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.huggingface.shards import DTYPES, INDEX_NAME, SINGLE_NAME
from megatron.early_exit.checkpoint.lazy import LazyWeights, content_hash
from megatron.early_exit.checkpoint.writer import Report

_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(
    folder: Path, weights: LazyWeights, max_bytes: int, report: Report
) -> dict[str, str]:
    """Write tensors into as few files as their largest size allows.

    Args:
        folder: where.
        weights: what, in the order of the files.
        max_bytes: of tensors in a file; one that is larger gets a file of its own.
        report: told of each tensor when it is written.

    Returns:
        `content_hash` of each tensor.

    Raises:
        ValueError: a tensor cannot be read.
    """
    shards = list(_divide(weights, max_bytes))
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_NAME
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes |= _write(folder / file, {name: weights[name] for name in names}, report)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def _divide(weights: LazyWeights, max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        if names and size + tensor.num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.num_bytes
    yield names


def _write(path: Path, weights: LazyWeights, report: Report) -> dict[str, str]:
    # The largest entries first, such that each tensor begins at a multiple of its entries' size.
    ordered = dict(sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    hashes: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in ordered.items():
            found = tensor.read().contiguous()
            hashes[name] = content_hash(found)
            file.write(found.flatten().view(torch.uint8).numpy().data)
            report(name, tensor.num_bytes)
    return hashes
