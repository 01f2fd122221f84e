"""Cores and memory that this process may use, which may be less than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def usable_cores(cgroups: Path = _CGROUPS, cpus: Path = _CPUS) -> int:
    """Physical cores that this process may keep busy, at least one.

    Two hardware threads of a core count once; the process's affinity and the quota of its cgroup
    are respected.

    Args:
        cgroups, cpus: where the system tells of them.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpus, number) for number in os.sched_getaffinity(0)})
    else:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = min(_quotas(cgroups), default=math.inf)
    return cores if quota == math.inf else max(1, min(cores, math.ceil(quota)))


def available_memory(cgroups: Path = _CGROUPS) -> int:
    """Bytes that this process may still take without swapping.

    Args:
        cgroups: where the system tells of its limits.
    """
    return min([psutil.virtual_memory().available, *_memory_left(cgroups)])


def _siblings(cpus: Path, number: int) -> str:
    """Names the core of a hardware thread; by its own number where that is not told."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        text = _text(cpus / f"cpu{number}" / "topology" / name)
        if text:
            return text
    return str(number)


def _quotas(cgroups: Path) -> Iterator[float]:
    """Cores that each cgroup around this process allows."""
    for folder in _folders(cgroups, ""):
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    for folder in _folders(cgroups, "cpu"):
        quota = _text(folder / "cpu.cfs_quota_us") or ""
        period = _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _memory_left(cgroups: Path) -> Iterator[int]:
    """Bytes that each cgroup around this process has left; pages that only cache files count."""
    for controller, limit_name, used_name, cache_name in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _folders(cgroups, controller):
            limit, used = (_text(folder / name) or "" for name in (limit_name, used_name))
            if limit.isdigit() and used.isdigit():
                cached = _field(folder / "memory.stat", cache_name)
                yield max(0, int(limit) - int(used) + cached)


def _folders(cgroups: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it.

    Args:
        cgroups: the root of all.
        controller: of version 1; "" is version 2, which has one tree for all.
    """
    for line in (_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):
            # In a container the root is often the process's own, and the path is outside of it.
            if (cgroups / controller / part).is_dir():
                yield cgroups / controller / part


def _field(path: Path, name: str) -> int:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
