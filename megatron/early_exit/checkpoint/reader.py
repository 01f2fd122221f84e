"""Reading Megatron's distributed checkpoints (`torch_dist` format) in one process.

For every layout of tensor, pipeline and data parallelism, the index of a checkpoint lists global
tensors and the places of their pieces. Assembling them needs no process group, no model and no
Megatron.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.early_exit.checkpoint.location import METADATA_NAME
from megatron.early_exit.checkpoint.safe_pickle import load_index, load_state
from megatron.early_exit.patches.messages import without_distributed_warning

_COMMON_KEY = "common_state/shard_0_1"
_COMMON_FILE = "common.pt"


class _IndexedReader(dcp.FileSystemReader):
    """torch's reader over an index that was read before, once and safely."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _OneTensor(dcp.DefaultLoadPlanner):
    """Plans to load a slice of a global tensor into a tensor in memory.

    Args:
        name: of the global tensor.
        offsets: where in it the tensor in memory begins.
        tensor: in memory.
        index: of the checkpoint.
    """

    def __init__(self, name: str, offsets: torch.Size, tensor: Tensor, index: Metadata) -> None:
        super().__init__()
        self.name, self._tensor = name, tensor
        entry = index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        self._entry = entry
        self._chunk = ChunkStorageMetadata(offsets, tensor.size())

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self.name, self._entry, [self._chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensor


class CheckpointReader:
    """The tensors of one checkpoint, by their global names.

    Args:
        iteration_dir: the directory of one iteration.

    Raises:
        ValueError: it is not a readable distributed checkpoint.
    """

    def __init__(self, iteration_dir: Path) -> None:
        self.path = iteration_dir
        self._index = load_index(iteration_dir / METADATA_NAME)
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        self.tensors = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Name -> size, dtype and pieces of every tensor, the optimizer's included."""

    def shape(self, name: str) -> torch.Size:
        """The global shape of a tensor."""
        return self.tensors[name].size

    def read(self, name: str, place: int | None = None) -> Tensor:
        """Load one tensor of any shape, in the dtype it was stored in.

        Args:
            name: its global name.
            place: the entry of its first dimension that is wanted, as of a tensor that stacks all
                layers; None is all of it.

        Raises:
            ValueError: its files are missing or damaged.
        """
        entry = self.tensors[name]
        offsets, size = [0] * len(entry.size), list(entry.size)
        if place is not None:
            offsets[0], size[0] = place, 1
        tensor = torch.empty(size, dtype=entry.properties.dtype)
        self._load(_OneTensor(name, torch.Size(offsets), tensor, self._index))
        return tensor if place is None else tensor[0]

    def common_state(self) -> dict[str, Any]:
        """The state that all ranks share: `args` (attributes by Megatron's argument names),
        iteration, ...

        Raises:
            ValueError: the checkpoint has none, or it is damaged.
        """
        legacy = self.path / _COMMON_FILE
        label = f"common state of checkpoint {self.path}"
        if legacy.is_file():
            with legacy.open("rb") as file:
                state = load_state(file, label)
        elif isinstance(self._index.state_dict_metadata.get(_COMMON_KEY), BytesStorageMetadata):
            state = load_state(BytesIO(self._read_bytes(_COMMON_KEY)), label)
        else:
            raise ValueError(f"checkpoint {self.path}: has no common state with its arguments")
        if isinstance(state, list):
            state = state[0]
        if not isinstance(state, dict):
            raise ValueError(f"{label} is a {type(state).__name__}, not a dictionary")
        return state

    def _load(self, one: "_OneTensor") -> None:
        try:
            with without_distributed_warning():
                reader = _IndexedReader(self.path, self._index)
                dcp.load({}, storage_reader=reader, planner=one, no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter is not an Exception
            if isinstance(error, CheckpointException):
                _raise_signals(error)
            raise ValueError(f"checkpoint {self.path}: {one.name} is missing or damaged") from error

    def _read_bytes(self, name: str) -> bytes:
        entries = self._index.storage_data.items()
        storage = next((entry for index, entry in entries if index.fqn == name), None)
        if storage is None:
            raise ValueError(f"checkpoint {self.path}: its index does not say where {name} is")
        try:
            with (self.path / storage.relative_path).open("rb") as file:
                file.seek(storage.offset)
                return file.read(storage.length)
        except OSError as error:
            raise ValueError(f"checkpoint {self.path}: {name} cannot be read: {error}") from error


def _raise_signals(error: CheckpointException) -> None:
    """Raise the exception of a signal itself, which torch wraps like any other."""
    for failure, _ in error.failures.values():
        if not isinstance(failure, Exception):
            raise failure from error
