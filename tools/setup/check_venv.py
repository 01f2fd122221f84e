"""Checks that the environment running this file holds the project and all that it requires, in the
versions of the lock.

Follows the requirements of the installed project from package to package by their metadata alone,
which takes a fraction of a second. Prints what is missing or damaged and exits with status 1.
"""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PROJECT = "megatron-early-exit"
EXTRAS = ("dev", "docs", "hf", "server")
LOCK = Path(__file__).parents[2] / "requirements.lock"


def is_whole(installed: Distribution) -> bool:
    """Whether the list of a package's files is there, and so is each top-level file or folder."""
    record = installed.read_text("RECORD") or ""
    tops = {line.partition(",")[0].partition("/")[0] for line in record.splitlines()}
    return bool(tops) and all(Path(str(installed.locate_file(top))).exists() for top in tops)


def locked(lock: Path) -> dict[str, str]:
    """The version that the lock gives to each package on this system, by its normalised name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pinned = Requirement(line)
            if pinned.marker is None or pinned.marker.evaluate():
                (version,) = pinned.specifier
                versions[canonicalize_name(pinned.name)] = version.version
    return versions


def faults(lock: Path = LOCK) -> Iterator[str]:
    """Yields one sentence for each requirement that is not met, or is in another version than that
    of the lock."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    versions = locked(lock)
    waiting = [Requirement(f"{PROJECT}[{','.join(EXTRAS)}]")]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name} is not installed"
            continue
        if not wanted.specifier.contains(found.version, prereleases=True):
            yield f"{wanted.name} {found.version} is installed, {wanted.specifier} is needed"
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) in seen:
                continue
            seen.add((wanted.name, extra))
            if not extra and not is_whole(found):
                yield f"{wanted.name} is installed in part"
            if not extra and wanted.name != PROJECT:
                version = versions.get(canonicalize_name(wanted.name))
                if version is None:
                    yield f"{wanted.name} is not in {lock.name}: run make lock"
                elif not SpecifierSet(f"=={version}").contains(found.version, prereleases=True):
                    yield f"{wanted.name} {found.version} is installed, {lock.name} has {version}"
            for line in found.requires or ():
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    waiting.append(requirement)


def main() -> int:
    """Returns the exit status: 0 if the environment is complete."""
    if importlib.util.find_spec("packaging") is None:
        found = ["packaging is not installed"]
    else:
        found = sorted(set(faults()))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
