"""The indices that Megatron's data sets keep on disk, after a run was killed while writing them.

They are written in place, and a file that is there is taken to be whole: what was cut short would
stop every later run.
"""

import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron.early_exit.training.loop.data import data_sources

_STILL_WRITING_S = 2.0


def cache_folders(args: Namespace) -> list[Path]:
    """Folders in which the data sets of a run keep their indices."""
    if args.data_cache_path is not None:
        return [Path(args.data_cache_path)]
    return [Path(prefix) / "cache" / "GPTDataset_indices" for _, prefix in data_sources(args)]


def remove_unfinished_indices(folders: Iterable[Path]) -> list[Path]:
    """Remove index files that were cut short, so that they are built again; on one rank only.

    A file that grows is left to the run that writes it.

    Returns:
        What was removed.
    """
    cut = [
        (path, path.stat().st_size)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.glob("*.npy"))
        if not _is_whole(path)
    ]
    if not cut:
        return []
    time.sleep(_STILL_WRITING_S)
    removed = []
    for path, size in cut:
        if path.exists() and path.stat().st_size == size and not _is_whole(path):
            path.unlink()
            removed.append(path)
    return removed


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return False
    return True
