"""The checkpoints in a directory, and which of them are whole.

Megatron writes the data of a checkpoint, then its index (`.metadata`), then `metadata.json`, and
at last the iteration into `latest_checkpointed_iteration.txt`, the last two in place. A process may
be killed between or within any of these steps, and while old checkpoints are being deleted. So the
text file is believed only where it names a whole checkpoint; otherwise the newest whole one counts.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from megatron.early_exit.checkpoint.location import METADATA_NAME, TRACKER_NAME
from megatron.early_exit.checkpoint.safe_pickle import load_index
from megatron.early_exit.checkpoint.text_files import write_whole

_CONFIG_NAME = "metadata.json"
_HASHES_NAME = "integrity.json"
_COMMON_NAME = "common.pt"
_COMMON_KEY_PREFIX = "common_state/"
_ASIDE_NAME = "set-aside"
_ITERATION_DIR = re.compile(r"iter_(\d{7,})")
_RELEASE = "release"
_TRACKER_RETRIES = 10
_TRACKER_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    iteration: int
    """Iterations that had been completed; 0 for a released model."""


class CheckpointDirectory:
    """A directory that training saves to or loads from.

    Args:
        path: need not exist.
        needs_hashes: a checkpoint must have the file of hashes that `--verify-integrity` reads.
    """

    def __init__(self, path: str | Path, needs_hashes: bool = False) -> None:
        self.path = Path(path)
        self.needs_hashes = needs_hashes

    @property
    def tracker(self) -> str | None:
        """What the text file names, `release` or digits; "" where it holds anything else, None
        where there is no such file."""
        for _ in range(_TRACKER_RETRIES):
            try:
                name = (self.path / TRACKER_NAME).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return None
            except UnicodeDecodeError:
                return ""
            if name == _RELEASE or re.fullmatch(r"[0-9]+", name):
                return name
            # Another process may be writing it at this moment.
            time.sleep(_TRACKER_RETRY_S)
        return ""

    def iterations(self) -> list[int]:
        """Iterations that have a directory, whole or not, newest first."""
        if not self.path.is_dir():
            return []
        found = (_ITERATION_DIR.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path_of(self, iteration: int) -> Path:
        """The directory of one iteration."""
        return self.path / f"iter_{iteration:07d}"

    def defect(self, path: Path) -> str | None:
        """Why the checkpoint at `path` cannot be loaded, or None."""
        if _is_legacy(path):
            return "it is in Megatron's legacy format, not torch_dist"
        if not (path / _CONFIG_NAME).is_file():
            return "its save was not finished"
        try:
            json.loads((path / _CONFIG_NAME).read_text(encoding="utf-8"))["sharded_backend"]
            if self.needs_hashes:
                json.loads((path / _HASHES_NAME).read_text(encoding="utf-8"))["files"]
            index = load_index(path / METADATA_NAME)
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"its description is damaged ({error})"
        sizes: dict[str, int] = {}
        for entry in index.storage_data.values():
            end = entry.offset + entry.length
            sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), end)
        if not any(name.startswith(_COMMON_KEY_PREFIX) for name in index.state_dict_metadata):
            sizes[_COMMON_NAME] = 1
        for name, size in sorted(sizes.items()):
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size < size:
                return f"{name} is cut short"
        return None

    def has_release(self) -> bool:
        """There is a whole model that was converted or released."""
        path = self.path / _RELEASE
        return path.is_dir() and self.defect(path) is None

    def has_progress(self) -> bool:
        """There is a whole checkpoint of a training run."""
        return any(self.defect(self.path_of(one)) is None for one in self.iterations())

    def find(self, iteration: int | None = None) -> Checkpoint | None:
        """The checkpoint to load: the given one, else the one that the text file names, else the
        newest whole one. None where there has never been a checkpoint.

        A whole checkpoint that is newer than the text file was saved by a run that was killed
        before it could name it, and is preferred; an older one beyond the named iteration belongs
        to a run that was taken back, and is not.

        Raises:
            ValueError: there are checkpoints, but not the given one, or no whole one.
        """
        if iteration is not None:
            return self._checked(self.path_of(iteration), iteration)
        named = self.tracker
        if named == _RELEASE:
            return self._checked(self.path / _RELEASE, 0)
        limit = int(named) if named else None
        defects = []
        for candidate in self.iterations():
            path = self.path_of(candidate)
            if limit is not None and candidate > limit and not self._is_newer_than_tracker(path):
                continue
            if candidate == limit and _is_legacy(path):
                return self._checked(path, candidate)
            defect = self.defect(path)
            if defect is None:
                return Checkpoint(path, candidate)
            defects.append(f"{path.name}: {defect}")
        if named is None:
            return None
        reason = "; ".join(defects[:3]) or f"{TRACKER_NAME} names a checkpoint that is not there"
        raise ValueError(f"there is no whole checkpoint in {self.path} ({reason})")

    def _checked(self, path: Path, iteration: int) -> Checkpoint:
        defect = self.defect(path) if path.is_dir() else "there is no such directory"
        if defect is not None:
            raise ValueError(f"checkpoint {path} cannot be loaded: {defect}")
        return Checkpoint(path, iteration)

    def _is_newer_than_tracker(self, path: Path) -> bool:
        try:
            finished = (path / _CONFIG_NAME).stat().st_mtime_ns
            return finished > (self.path / TRACKER_NAME).stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def set_tracker(self, iteration: int) -> None:
        """Make the text file name `iteration`; a reader sees the old or the new name."""
        write_whole(self.path / TRACKER_NAME, str(iteration))

    def drop_tracker(self) -> None:
        """Remove the text file, which names no checkpoint that is whole."""
        (self.path / TRACKER_NAME).unlink(missing_ok=True)

    def clear_after(self, iteration: int) -> list[str]:
        """Take what a run that continues from `iteration` would write over out of its way.

        Saves that were never finished are removed. Everything else is moved, whole: data of an
        older save must not be mixed with that of a new one if the new one is interrupted.

        Returns:
            A line for each directory, telling what was done.
        """
        lines = []
        for later in self.iterations():
            path = self.path_of(later)
            if later <= iteration:
                break
            if _was_never_finished(path):
                shutil.rmtree(path)
                lines.append(f"removed {path}: its save was interrupted")
            else:
                lines.append(f"moved {path} to {self._set_aside(path)}: it is later than the start")
        return lines

    def _set_aside(self, path: Path) -> Path:
        folder = self.path / _ASIDE_NAME
        folder.mkdir(exist_ok=True)
        target, count = folder / path.name, 1
        while target.exists():
            count += 1
            target = folder / f"{path.name}.{count}"
        path.rename(target)
        return target


def _is_legacy(path: Path) -> bool:
    return any(entry.name.startswith("mp_rank_") for entry in path.iterdir())


def _was_never_finished(path: Path) -> bool:
    """There is no index, which is written when all data is: nothing can load this."""
    names = {entry.name for entry in path.iterdir()}
    return not (names & {METADATA_NAME, _CONFIG_NAME}) and not _is_legacy(path)
