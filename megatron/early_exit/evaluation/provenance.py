"""Where figures come from: the machine, and the code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.hardware.resources import usable_cores

_PACKAGES = ("megatron-early-exit", "megatron-core", "torch", "numpy", "transformers")
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
    """The commit of this code, where it is in a repository, and the versions of what it stands on.

    A commit with changes that are not committed has "-dirty" behind it.
    """
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


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
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    # The commit itself is wanted, not a tag near it.
    command.append("--exclude=*")
    # An installed package is in no repository, or in somebody else's.
    if not (_ROOT / "pyproject.toml").is_file():
        return None
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return made.stdout.strip() or None if made.returncode == 0 else None
