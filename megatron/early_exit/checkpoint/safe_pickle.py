"""Reads the pickled parts of a checkpoint without running any code that they name.

A checkpoint is untrusted data, and a pickle may call any function. The index of a distributed
checkpoint is read with a fixed list of harmless classes; the state common to all ranks is read by
torch's restricted loader, where every class that the loader does not know becomes an `Inert` record
of what was stored.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

_INDEX_CLASSES = {
    "collections": ("OrderedDict",),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
    "torch.serialization": ("_get_layout",),
}
"""What an index may name: by module, its classes."""

_INERT_PACKAGES = ("megatron", "pathlib")
"""Packages whose classes occur in indexes, but are not needed to read tensors."""


class Inert:
    """Stands for an object of a class that is not loaded: keeps what was stored, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.partition(".")[0] in _INERT_PACKAGES:
            return Inert
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


def load_index(path: Path) -> Metadata:
    """Read the `.metadata` file of a distributed checkpoint.

    Raises:
        ValueError: the file is damaged or holds anything but an index.
    """
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"checkpoint index {path} cannot be read: {error}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"checkpoint index {path} holds a {type(index).__name__}, not an index")
    return index


def load_state(source: BinaryIO, label: str) -> Any:
    """Read an object written by `torch.save`; instances of unknown classes come back `Inert`.

    Args:
        source: a seekable binary file.
        label: what to call it in errors.

    Raises:
        ValueError: the file is damaged or wants something that torch forbids.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        source.seek(0)
        # `Namespace` is only a holder of attributes, as `Inert` is: both keep `__dict__`.
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # as above; torch's own text advises to read it unsafely
        raise ValueError(f"{label} is damaged, or holds what cannot be read safely") from error
