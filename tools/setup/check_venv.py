"""Checks that the environment running this file holds the project and all that it requires.

Follows the requirements of the installed project from package to package by their metadata alone,
which takes a fraction of a second. Prints what is missing or damaged and exits with status 1.
"""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PROJECT = "megatron-early-exit"
EXTRAS = ("dev", "hf", "server")


def is_whole(installed: Distribution) -> bool:
    """Whether the list of a package's files is there, and so is each top-level file or folder."""
    record = installed.read_text("RECORD") or ""
    tops = {line.partition(",")[0].partition("/")[0] for line in record.splitlines()}
    return bool(tops) and all(Path(str(installed.locate_file(top))).exists() for top in tops)


def faults() -> Iterator[str]:
    """Yields one sentence for each requirement that is not met."""
    from packaging.requirements import Requirement

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
