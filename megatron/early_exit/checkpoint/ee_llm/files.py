"""The files of EE-LLM's checkpoints, which are read without running code that they contain.

Each pair of tensor and pipeline rank of EE-LLM (arXiv 2312.04916) saved one pickle,
`mp_rank_TT/model_optim_rng.pt`, or with pipeline stages `mp_rank_TT_PPP/model_optim_rng.pt`, in the
folder of an iteration.
"""

import pickle
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.location import METADATA_NAME, TRACKER_NAME, named_iteration

_FILE = "model_optim_rng.pt"
_LAYOUT_OF_WEIGHTS = 3.0
"""`checkpoint_version`: queries, keys and values of one head, or group of heads, lie together."""


class _Skipped:
    """Replaces stored objects that are not needed: the states of random number generators."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_KNOWN_TYPES: dict[str, type] = {
    "argparse.Namespace": Namespace,
    "megatron.core.enums.ModelType": _Skipped,
    "megatron.model.enums.ModelType": _Skipped,
    "numpy.core.multiarray._reconstruct": _Skipped,
    "numpy._core.multiarray._reconstruct": _Skipped,
    "numpy.core.multiarray.scalar": _Skipped,
    "numpy._core.multiarray.scalar": _Skipped,
    "numpy.ndarray": _Skipped,
    "numpy.dtype": _Skipped,
    "_codecs.encode": _Skipped,
}
"""The names that a file may contain besides those that torch allows, and what replaces them
here."""


class RankFile:
    """The file that one rank saved.

    Args:
        path: of the file. Its tensors stay in it until they are used.

    Raises:
        ValueError: it is damaged, or holds anything but a checkpoint of this kind.
    """

    def __init__(self, path: Path) -> None:
        state = _load(path)
        try:
            self.args: Namespace = state["args"]
            version = state.get("checkpoint_version")
            language_model = state["model"]["language_model"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: is not a checkpoint of EE-LLM, which has args and model/language_model"
            ) from error
        if not isinstance(self.args, Namespace):
            raise ValueError(f"{path}: its args are a {type(self.args).__name__}, not a Namespace")
        if version != _LAYOUT_OF_WEIGHTS:
            raise ValueError(
                f"{path}: checkpoint_version {version} is not supported, allowed: "
                f"{_LAYOUT_OF_WEIGHTS}"
            )
        self.path = path
        self.tensors: dict[str, Tensor] = dict(_flat(language_model, ""))
        """Tensors by their keys joined with dots: `encoder.layers.0.input_norm.weight`."""

    def drop_branches(self) -> None:
        """Leave one MLP to layers that have one for the backbone and one for an exit."""
        self.tensors = {
            name.replace(".mlp.trunk.", ".mlp."): tensor
            for name, tensor in self.tensors.items()
            if ".mlp.branch." not in name
        }


def find_iteration(path: Path) -> Path:
    """The folder with the ranks' folders.

    Args:
        path: a save directory, for its last iteration, or the folder of one iteration.

    Raises:
        ValueError: there is no checkpoint of EE-LLM.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: there is no such directory")
    _refuse_torch_dist(path, path)
    tracker = path / TRACKER_NAME
    if not tracker.is_file():
        if _first_file(path) is None:
            raise ValueError(
                f"checkpoint {path}: holds neither {TRACKER_NAME} (a save directory) nor "
                f"mp_rank_00/{_FILE} (one iteration of EE-LLM)"
            )
        return path
    iteration_dir = named_iteration(path)
    _refuse_torch_dist(path, iteration_dir)
    if _first_file(iteration_dir) is None:
        raise ValueError(
            f"checkpoint {path}: {TRACKER_NAME} names {iteration_dir.name}, but "
            f"{iteration_dir.name}/mp_rank_00/{_FILE} is not there"
        )
    return iteration_dir


def load_ranks(iteration_dir: Path) -> list[list[RankFile]]:
    """The files of all ranks: for each pipeline stage those of its tensor ranks, in order.

    Raises:
        ValueError: a file is missing or damaged, or its arguments do not say how many there are.
    """
    path = _first_file(iteration_dir)
    assert path is not None
    first = RankFile(path)
    sizes = {}
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        size = getattr(first.args, name, None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{path}: its args say {name} {size}, allowed: 1 or more")
        sizes[name] = size
    tensor_ranks, stages = sizes.values()
    named = stages > 1
    files = {
        (rank, stage): iteration_dir
        / (f"mp_rank_{rank:02d}_{stage:03d}" if named else f"mp_rank_{rank:02d}")
        / _FILE
        for stage in range(stages)
        for rank in range(tensor_ranks)
    }
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {iteration_dir}: {missing[0].parent.name}/{_FILE} is missing, its args "
            f"say tensor parallelism {tensor_ranks} and pipeline parallelism {stages}"
        )
    loaded = {place: first if file == path else RankFile(file) for place, file in files.items()}
    return [[loaded[rank, stage] for rank in range(tensor_ranks)] for stage in range(stages)]


def _refuse_torch_dist(path: Path, iteration_dir: Path) -> None:
    if (iteration_dir / METADATA_NAME).is_file():
        raise ValueError(
            f"checkpoint {path}: is one of the torch_dist format, not EE-LLM's, and needs no import"
        )


def _first_file(iteration_dir: Path) -> Path | None:
    names = ("mp_rank_00", "mp_rank_00_000")
    return next((f for n in names if (f := iteration_dir / n / _FILE).is_file()), None)


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: is truncated, or was not written by torch.save")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        foreign = sorted(set(named) - _KNOWN_TYPES.keys())
        if not foreign:
            stands_for: list[Any] = [(_KNOWN_TYPES[name], name) for name in named]
            with torch.serialization.safe_globals(stands_for):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: is damaged, or holds what cannot be read safely") from error
    raise ValueError(f"{path}: names {foreign[0]}, which has no place in a checkpoint")


def _flat(values: object, prefix: str) -> list[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        return [(prefix, values)]
    if not isinstance(values, Mapping):
        return []
    start = f"{prefix}." if prefix else ""
    return [pair for key, value in values.items() for pair in _flat(value, f"{start}{key}")]
