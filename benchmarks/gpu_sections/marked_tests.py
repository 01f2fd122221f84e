"""The tests that need a GPU, run by pytest in a process of their own."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from gpu_sections.findings import SectionReport
from gpu_sections.sizes import Sizes

REPOSITORY = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"^\s*(@|pytestmark = )pytest\.mark\.gpu\b", re.MULTILINE)
COUNTS = ("tests", "failures", "errors", "skipped")


def check_marked_tests(report: SectionReport, sizes: Sizes) -> None:
    """Run the tests that are marked with `gpu`."""
    files = marked_files(REPOSITORY / "tests")
    counts, output = run_tests(files)
    passed = counts["tests"] - sum(counts[name] for name in COUNTS[1:])
    found = f"{passed} passed of {counts['tests']} in {len(files)} files"
    found += "".join(f", {counts[name]} {name}" for name in COUNTS[1:] if counts[name])
    is_broken = counts["failures"] + counts["errors"] > 0
    if is_broken:
        found += f": {output}"
    report.check(
        "tests marked with gpu",
        found,
        "all of them",
        passed == counts["tests"] > 0,
        # Without a GPU they are skipped; what fails all the same is wrong.
        gpu_only="" if is_broken else "they need one",
        passed=passed,
        **counts,
    )


def marked_files(folder: Path) -> list[Path]:
    """The test files that have such tests: to collect all others would take longer than to run
    these."""
    return sorted(file for file in folder.rglob("test_*.py") if _MARK.search(file.read_text()))


def run_tests(files: Sequence[Path]) -> tuple[Mapping[str, int], str]:
    """Run tests marked with `gpu`.

    Returns:
        The counts that pytest reports, and the names of those that did not pass.

    Raises:
        RuntimeError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", "-m", "gpu", "-q"),
            *("-p", "no:cacheprovider"),
            *("--junitxml", str(file), *map(str, files)),
        ]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"pytest could not start: {(done.stderr or done.stdout)[-300:]}")
        (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in COUNTS}
    bad = [
        case.attrib["name"]
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, " ".join(bad)
