"""Where figures come from: the machine, the code, and the model's files."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.hardware.resources import usable_cores

_PACKAGES = ("megatron-early-exit", "megatron-core", "torch", "numpy", "transformers")
_LARGE_BYTES = 16 * 2**20
"""Larger files, which have weights, are known by their size and date: reading all of a large model
would take minutes at each start."""
_ROOT = Path(__file__).resolve().parents[3]


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a model runs on.

    Args:
        device: where it is computed.
    """
    found = {
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def software() -> dict[str, Any]:
    """The commit of this code and a hash of its lock, where it is in a repository, and the versions
    of what it stands on.

    A commit with changes that are not committed has "-dirty" behind it, and a hash of the changes
    to files that the repository knows.
    """
    return {
        "commit": _commit(),
        "lock": _lock(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash that changes where a model's files are other ones: names, sizes, contents of files up
    to 16 MiB, and dates of larger ones.

    Args:
        paths: files, and folders of which all files count.

    Raises:
        OSError: a file cannot be read.
    """
    made = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (one for one in files if one.is_file()):
            status = file.stat()
            is_large = status.st_size > _LARGE_BYTES
            known = status.st_mtime_ns if is_large else _hash(file.read_bytes())
            name = file.relative_to(path.parent)
            made.update(f"{name}\0{status.st_size}\0{known}\0".encode(errors="surrogateescape"))
    return made.hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # An installed package is in no repository, or in somebody else's.
    if not (_ROOT / "pyproject.toml").is_file():
        return None
    # The commit itself is wanted, not a tag near it.
    made = _git("describe", "--always", "--abbrev=40", "--exclude=*")
    if made is None:
        return None
    # What benchmarks have recorded is no code.
    paths = (".", ":(exclude)benchmarks/records")
    changes = _git("diff", "--no-ext-diff", "--binary", "HEAD", "--", *paths)
    commit = made.decode().strip()
    return f"{commit}-dirty-{_hash(changes)[:12]}" if changes else commit


def _lock() -> str | None:
    try:
        return _hash((_ROOT / "requirements.lock").read_bytes())
    except OSError:
        return None


def _git(*words: str) -> bytes | None:
    """What a command of git says of this repository; None where it fails."""
    try:
        made = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return made.stdout if made.returncode == 0 else None
