"""Paths of the parts of a checkpoint.

A save directory contains one `iter_XXXXXXX` directory per checkpoint, a text file that names the
last complete one, and what all of them share (description, tokenizer).
"""

from dataclasses import dataclass
from pathlib import Path

TRACKER_NAME = "latest_checkpointed_iteration.txt"
DESCRIPTION_NAME = "early_exit_model.json"
TOKENIZER_NAME = "tokenizer"
METADATA_NAME = ".metadata"


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """One checkpoint and the save directory that it belongs to."""

    save_dir: Path
    """The folder that `--save` named."""
    iteration_dir: Path
    """The folder in it with the tensors of one iteration."""

    @property
    def tokenizer_dir(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.save_dir / TOKENIZER_NAME


def locate(path: str | Path) -> CheckpointLocation:
    """Find the checkpoint that `path` refers to.

    Args:
        path: a save directory, for its last complete checkpoint, or the directory of one
            iteration inside it.

    Raises:
        ValueError: there is no distributed checkpoint there.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: there is no such directory")
    if (path / METADATA_NAME).is_file():
        return CheckpointLocation(path.resolve().parent, path.resolve())
    tracker = path / TRACKER_NAME
    if not tracker.is_file():
        raise ValueError(
            f"checkpoint {path}: holds neither {TRACKER_NAME} (a save directory) nor "
            f"{METADATA_NAME} (one iteration of the torch_dist format){_hint(path)}"
        )
    iteration_dir = named_iteration(path)
    if not (iteration_dir / METADATA_NAME).is_file():
        raise ValueError(
            f"checkpoint {path}: {TRACKER_NAME} names {iteration_dir.name}, which is not a "
            f"checkpoint of the torch_dist format{_hint(iteration_dir)}"
        )
    return CheckpointLocation(path, iteration_dir)


def named_iteration(save_dir: Path) -> Path:
    """The folder that the text file of a save directory names, whether it exists or not.

    Raises:
        ValueError: the text file names none.
    """
    try:
        name = (save_dir / TRACKER_NAME).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        name = "bytes that are no text"
    if name != "release" and not (name.isascii() and name.isdigit()):
        raise ValueError(f"checkpoint {save_dir}: {TRACKER_NAME} says {name!r}, not an iteration")
    return save_dir / (name if name == "release" else f"iter_{int(name):07d}")


def _hint(path: Path) -> str:
    """A hint for error messages on what to do with a folder of another format."""
    verb = None
    if (path / "config.json").is_file():
        verb = "import-hf"
    elif any(path.glob("mp_rank_00*/model_optim_rng.pt")):
        verb = "import-ee-llm"
    return "" if verb is None else f": convert it with tools/checkpoint.py {verb}"
