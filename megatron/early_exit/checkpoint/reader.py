"""Reading Megatron's distributed checkpoints (`torch_dist` format) in one process.

Whatever layout of tensor, pipeline and data parallelism wrote a checkpoint, its index lists global
tensors and where their pieces are. No process group, no model and no Megatron is needed to put
them together.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron.early_exit.checkpoint.location import METADATA_NAME
from megatron.early_exit.checkpoint.safe_pickle import as_file, load_index, load_state

_COMMON_KEY = "common_state/shard_0_1"
_COMMON_FILE = "common.pt"


class _IndexedReader(dcp.FileSystemReader):
    """torch's reader over an index that was read before, once and safely."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


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

    def read(self, name: str) -> Tensor:
        """Load one tensor whole, in the dtype it was stored in.

        Raises:
            ValueError: its files are missing or damaged.
        """
        entry = self.tensors[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._load({name: tensor})
        return tensor

    def common_state(self) -> dict[str, Any]:
        """What all ranks share: `args` (attributes by Megatron's argument names), iteration, ...

        Raises:
            ValueError: the checkpoint has none, or it is damaged.
        """
        legacy = self.path / _COMMON_FILE
        label = f"common state of checkpoint {self.path}"
        if legacy.is_file():
            with legacy.open("rb") as file:
                state = load_state(file, label)
        elif isinstance(self._index.state_dict_metadata.get(_COMMON_KEY), BytesStorageMetadata):
            state = load_state(as_file(self._read_bytes(_COMMON_KEY)), label)
        else:
            raise ValueError(f"checkpoint {self.path}: has no common state with its arguments")
        if isinstance(state, list):
            state = state[0]
        if not isinstance(state, dict):
            raise ValueError(f"{label} is a {type(state).__name__}, not a dictionary")
        return state

    def _load(self, state: dict[str, Any]) -> None:
        try:
            with warnings.catch_warnings():
                # It says that torch.distributed is not initialised, which is the point.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, storage_reader=_IndexedReader(self.path, self._index), no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter is not an Exception
            names = ", ".join(state)
            raise ValueError(f"checkpoint {self.path}: {names} is missing or damaged") from error

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
