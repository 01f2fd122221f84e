"""Writes a model as one of Megatron's distributed checkpoints, in one process and one tensor at a
time.

The result is a save directory like those of training, except that it holds only weights: its
checkpoint is called `release`, as Megatron calls converted ones, and training that loads it begins
with iteration 0.
"""

import io
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.checkpoint.lazy import LazyTensor, LazyWeights, content_hash
from megatron.early_exit.checkpoint.location import TRACKER_NAME
from megatron.early_exit.checkpoint.weights import LAYERS
from megatron.early_exit.patches.messages import without_distributed_warning

_COMMON_KEY = "common_state/shard_0_1"
_MODULES_WITH_STATE = ("decoder.", "mtp.", "exits.")
_RELEASE = "release"

Report = Callable[[str, int], object]
"""Called with the name and the size in bytes of each tensor when it is written."""


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if the block succeeds, and is deleted otherwise.

    Raises:
        ValueError: there is something at `target` already, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already, and nothing is written over it")
    partial = target.with_name(f".{target.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(
    save_dir: Path,
    weights: LazyWeights,
    description: ModelDescription,
    args: Namespace,
    report: Report = lambda name, num_bytes: None,
) -> None:
    """Write a model, see `new_directory` for where.

    Args:
        save_dir: empty or new.
        weights: every tensor that is to be stored.
        description: of the model; its tokenizer's files are copied.
        args: Megatron's arguments of the model, see `megatron_args`.
        report: called for each tensor.

    Raises:
        ValueError: a tensor cannot be read.
        OSError: a file cannot be written.
    """
    if description.rule is not None:
        description = replace(description, rule=replace(description.rule, iteration=_RELEASE))
    write_description(save_dir, description)
    directory = save_dir / _RELEASE
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
    try:
        with without_distributed_warning():
            dcp.save(
                {},
                # One file, written in the order of the plan, with nothing read ahead.
                storage_writer=dcp.FileSystemWriter(directory, per_thread_copy_ahead=0),
                planner=_StreamPlanner(weights, common, report),
                no_dist=True,
            )
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, ValueError):
            raise ValueError(str(reason)) from error
        if isinstance(reason, RuntimeError):
            # What torch says of a full disk.
            raise OSError(f"is the disk full? ({reason})") from error
        # The disk again; or a signal, which torch wraps too.
        raise reason from error
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")
    (save_dir / TRACKER_NAME).write_text(_RELEASE, encoding="utf-8")


def check_written(stored: LazyWeights, hashes: Mapping[str, str], report: Report) -> None:
    """Read tensors again after they have been written.

    Raises:
        ValueError: one is not what it was, by its content hash.
    """
    for name, tensor in stored.items():
        if content_hash(tensor.read()) != hashes[name]:
            raise ValueError(
                f"{name} differs from what was written when it is read again: is the disk faulty?"
            )
        report(name, tensor.num_bytes)


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Plans to write tensors, which are read when their turn comes, and what all ranks share."""

    def __init__(self, weights: LazyWeights, common: dict[str, Any], report: Report) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights, self._report = weights, report
        layers = {name.split(".")[2] for name in weights if name.startswith(LAYERS)}
        self._num_layers = len(layers)
        self._objects = {_COMMON_KEY: common, **dict.fromkeys(self._state_keys())}

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*objects, *(self._item(*entry) for entry in self._weights.items())])
        return self.plan

    def _state_keys(self) -> Iterator[str]:
        """Extra states of modules. Megatron refuses to load a model without them, although they are
        empty without Transformer Engine's FP8."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self._weights)
        for module in modules:
            if not module.startswith(_MODULES_WITH_STATE) or module.endswith(".projection"):
                continue
            names = [module]
            if module.endswith("linear_qkv"):
                names.append(module.replace("linear_qkv", "core_attention"))
            for name in names:
                layer, count = "0", 1
                if name.startswith(LAYERS):
                    layer, _, rest = name.removeprefix(LAYERS).partition(".")
                    name, count = f"{LAYERS}{rest}", self._num_layers
                yield f"{name}._extra_state/shard_{layer}_{count}"

    def _item(self, name: str, tensor: LazyTensor) -> WriteItem:
        """One tensor; for a tensor of a layer, its place in the tensor that stacks those of all
        layers, as Megatron stores equal layers."""
        size, offsets, chunk = tensor.shape, (0,) * len(tensor.shape), tensor.shape
        if name.startswith(LAYERS):
            layer, _, rest = name.removeprefix(LAYERS).partition(".")
            name = f"{LAYERS}{rest}"
            size, chunk = (self._num_layers, *size), (1, *chunk)
            offsets = (int(layer), *offsets)
        index = MetadataIndex(name, torch.Size(offsets), 0)
        return WriteItem(
            index,
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk)),
                TensorProperties(dtype=tensor.dtype),
                torch.Size(size),
            ),
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if index.fqn in self._objects:
            file = io.BytesIO()
            torch.save([self._objects[index.fqn]], file)
            return file
        assert write_item.tensor_data is not None
        name = index.fqn
        if name.startswith(LAYERS) and index.offset is not None:
            name = f"{LAYERS}{index.offset[0]}.{name.removeprefix(LAYERS)}"
        lazy = self._weights[name]
        tensor = lazy.read()
        self._report(name, lazy.num_bytes)
        return tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()
