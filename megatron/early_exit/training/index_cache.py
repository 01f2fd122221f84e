"""The indices that Megatron's data sets keep on disk, after a run was killed while writing them.

They are written in place, and a file that is there is taken to be whole: what was cut short would
stop every later run.
"""

import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from megatron.core.datasets.utils import get_blend_from_list

_STILL_WRITING_S = 2.0


def data_prefixes(args: Namespace) -> list[str]:
    """What the names of a run's indexed data sets begin with."""
    lists = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    blends = (get_blend_from_list(one) for one in lists if one)
    return sorted({prefix for blend in blends if blend is not None for prefix in blend[0]})


def cache_folders(args: Namespace) -> list[Path]:
    """Folders in which the data sets of a run keep their indices."""
    if args.data_cache_path is not None:
        return [Path(args.data_cache_path)]
    return [Path(prefix) / "cache" / "GPTDataset_indices" for prefix in data_prefixes(args)]


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
