"""What the project says of itself is true: paths, targets, flags, rooms, who runs the checks."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.documents import known_flags
from tests.helpers.text_tokenizers import make_tokenizer
from tests.helpers.tiny_models import LLAMA, make_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron" / "early_exit"
GITHUB = ROOT / ".github"
WORKFLOWS = GITHUB / "workflows"
# The planner's page has the lines that commands print, whatever their length; it has a test of its
# own, which runs them.
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")} - {"pipeline.md"}
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *sorted(f"docs/{name}" for name in PAGES),
)
# What looks like a path or a flag of the repository and is none: outputs, models on the hub, and
# what other programs have.
ELSEWHERE = (
    "build/",
    "/",
    "demo/",
    "my_",
    "facebook/",
    "nvidia.com/",
    "pretrain_gpt.py",
    "sweep.py",
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
GROUND = {
    *("config", "hardware", "patches", "legacy_tokens", "process_family"),
    *("ranges", "flags", "errors"),
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- paths, targets and flags ----------------------------------------------------------------


def missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    """Paths and links of a document in `folder` that lead nowhere. A path is below the root, or
    below the package; the name of a file or folder alone is that of one anywhere in the package."""
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    missing = [link for link in links if not (folder / link).exists()]
    for path in re.findall(r"(?<!`)`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|lock|cff))`", text):
        if path.startswith(ELSEWHERE):
            continue
        is_there = (ROOT / path).exists() or (PACKAGE / path).exists()
        if not is_there and ("/" in path.rstrip("/") or not any(PACKAGE.rglob(path))):
            missing.append(path)
    # Those in commands.
    inside = re.findall(r"\b(?:tools|examples|benchmarks|tests|megatron|docs)/[\w./-]*\w", text)
    return missing + [one for one in inside if not (ROOT / one).exists() and one not in missing]


def missing_targets(text: str) -> list[str]:
    """Targets that a document or workflow has `make` make, and Makefile does not."""
    known = set(re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.MULTILINE))
    targets = {target for line in known for target in line.split()}
    named = re.findall(r"(?:`|run: |^|entry: )(?:\w+=\S+ )?make ([a-z-]+)", text, re.MULTILINE)
    return [name for name in named if name not in targets]


def missing_flags(text: str) -> list[str]:
    known = known_flags()
    return [flag for flag in re.findall(r"`[^`\n]*?(--[a-z][\w-]+)", text) if flag not in known]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_is_there(name):
    text = (ROOT / name).read_text()
    assert missing_paths(text, (ROOT / name).parent) == []
    assert missing_targets(text) == []
    assert missing_flags(text) == []
    assert max(len(line) for line in text.splitlines() if "|" not in line) <= 100


@pytest.mark.parametrize(
    "path", sorted((GITHUB / "ISSUE_TEMPLATE").iterdir()), ids=lambda p: p.name
)
def test_what_a_template_names_is_there(path):
    text = path.read_text()
    assert missing_paths(text) == missing_targets(text) == missing_flags(text) == []


@pytest.mark.parametrize(
    ("find", "text", "found"),
    [
        (missing_paths, "`tools/none.py` and `tools/generate.py`", ["tools/none.py"]),
        (missing_paths, "in `training/none/`, `training/loss/`", ["training/none/"]),
        (missing_paths, "`config.py`, `gpt_model.py` and `none.py`", ["none.py"]),
        (missing_paths, "`python tools/none.py --load tools/generate.py`", ["tools/none.py"]),
        (missing_paths, "[a page](docs/none.md), [this](README.md)", ["docs/none.md"]),
        (missing_targets, "`make check`\nmake none\n        run: make never", ["none", "never"]),
        (missing_targets, "`WORKERS=4 make every`", ["every"]),
        (missing_flags, "`tools/generate.py --none 3`, `--tune-exit`, `--load`", ["--none"]),
    ],
)
def test_what_is_not_there_would_be_found(find: Callable[[str], list[str]], text, found):
    assert find(text) == found


def test_names_that_the_changelog_says_have_moved():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert {"work", "is_worker"} <= set(dir(EarlyExitEngine))
    assert not {"follow", "is_follower"} & set(dir(EarlyExitEngine))
    rows = re.findall(r"^ *\|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert len(rows) > 10
    module = re.compile(r"`((?:[a-z_]+\.)*[a-z_]+)`")
    for before, now in rows:
        if "EarlyExitEngine" in before or not module.search(now):
            continue
        for name in module.findall(now):
            assert find_spec(f"megatron.early_exit.{name.removesuffix('.check.check')}"), name
        for name in module.findall(before):
            still = {"inference.engine", "training", "server"}
            path = PACKAGE / name.replace(".", "/")
            gone = not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()
            assert gone or name in still, name


# --- who runs the checks ---------------------------------------------------------------------


def parts_of_check() -> list[str]:
    (line,) = re.findall(r"^check: ([a-z ]+)##", MAKEFILE, re.MULTILINE)
    return line.split()


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_hooks_are_the_parts_of_make_check():
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = repository["hooks"]
    assert repository["repo"] == "local"
    assert [hook["id"] for hook in hooks] == parts_of_check()
    for hook in hooks:
        assert hook["entry"] == f"make --no-print-directory {hook['id']}"
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_workflow_of_a_push_runs_the_checks_and_the_unit_tests():
    workflow = load(WORKFLOWS / "checks.yml")
    # YAML 1.1 reads "on" as true.
    assert set(workflow[True]) == {"push", "pull_request"}
    (job,) = workflow["jobs"].values()
    assert commands(job) == ["make setup", "make check", "make test-fast", "make docs"]
    assert job["strategy"]["matrix"]["python"] == supported_pythons()


def test_nightly_workflow_runs_every_test_and_the_ends_of_the_ranges():
    workflow = load(WORKFLOWS / "nightly.yml")
    assert "schedule" in workflow[True]
    (job,) = workflow["jobs"].values()
    assert commands(job) == ["make ${{ matrix.target }}"]
    runs = job["strategy"]["matrix"]["include"]
    assert {run["target"] for run in runs} == {"test", "test-oldest", "test-newest"}
    assert missing_targets("\n".join(f"make {run['target']}" for run in runs)) == []
    assert [run["python"] for run in runs if run["target"] == "test"] == supported_pythons()
    # Each of these prefers the version that it is named after, see make_range_venv.sh.
    ends = {run["target"]: run["python"] for run in runs}
    assert [ends["test-oldest"], ends["test-newest"]] == supported_pythons()


def supported_pythons() -> list[str]:
    prefix = "Programming Language :: Python :: "
    named = PYPROJECT["project"]["classifiers"]
    return [line.removeprefix(prefix) for line in named if line.startswith(prefix)]


@pytest.mark.parametrize("name", ["checks.yml", "nightly.yml"])
def test_workflow_gives_make_the_python_of_its_matrix(name):
    """Without PYTHON, the system's own 3.12 would be taken whatever the matrix says."""
    (job,) = load(WORKFLOWS / name)["jobs"].values()
    (setup,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    first = next(step for step in job["steps"] if "run" in step)
    assert first["env"] == {"PYTHON": f"${{{{ steps.{setup['id']}.outputs.python-path }}}}"}


# --- forms and citation ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug_report.yml", "feature_request.yml"])
def test_form_is_one_that_github_shows(name):
    form = load(GITHUB / "ISSUE_TEMPLATE" / name)
    assert {"name", "description", "body"} <= set(form)
    asked = [one for one in form["body"] if one["type"] != "markdown"]
    assert {one["type"] for one in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    identifiers = [one["id"] for one in asked]
    assert len(set(identifiers)) == len(identifiers)
    assert all(one["attributes"]["label"] for one in asked)
    assert any(one.get("validations", {}).get("required") for one in asked)


def test_bug_report_asks_for_what_is_needed():
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    assert "tools/checkpoint.py inspect" in text
    form = load(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")
    required = {one["id"] for one in form["body"] if one.get("validations", {}).get("required")}
    assert {"commands", "machine", "versions"} <= required


def test_citation_is_of_this_software_and_both_papers():
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    readme = (ROOT / "README.md").read_text()
    papers = re.findall(r"\[EE-(?:LLM|Tuning)\]\((https://arxiv.org/abs/[\d.]+)\)", readme)
    assert [one["url"] for one in citation["references"]] == papers
    for one in citation["references"]:
        (identifier,) = one["identifiers"]
        assert identifier["value"].removeprefix("arXiv:") == one["url"].rpartition("/")[2]
        assert all({"family-names", "given-names"} <= set(author) for author in one["authors"])


# --- the architecture page -------------------------------------------------------------------


def rooms() -> set[str]:
    found = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return found | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def imports_between_rooms() -> set[tuple[str, str]]:
    """From and to, by the syntax tree of every file, without those from the ground floor."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
            elif isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[:2] == ["megatron", "early_exit"] and len(parts) > 2:
                    found.add((room, parts[2]))
    known = rooms()
    return {(a, b) for a, b in found if a != b and b in known and b not in GROUND}


def test_every_room_is_described_once():
    table = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", ARCHITECTURE, re.MULTILINE)
    assert sorted(table) == sorted(rooms())


def test_arrows_are_the_imports_that_there_are():
    drawn = set()
    for start, end in re.findall(r"^    ([\w &]+) --> ([\w &]+)$", ARCHITECTURE, re.MULTILINE):
        if start != "entry" and end != "ground":
            drawn |= {(a, b) for a in start.split(" & ") for b in end.split(" & ")}
    assert drawn == imports_between_rooms()


def traced(call: Callable[[], Any]) -> tuple[set[str], Any]:
    """The files of the package whose functions a call runs, and what it returns. Patches that other
    tests of this process have made are left out."""
    found = set()
    patches = f"{PACKAGE}/patches/"

    def note(frame: Any, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(f"{PACKAGE}/") and not name.startswith(patches):
            found.add(name.removeprefix(f"{PACKAGE}/"))

    sys.setprofile(note)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return found, result


@pytest.mark.parametrize(("threshold", "layer"), [(0.0, 1), (1.0, 4)])
def test_a_token_passes_the_files_that_are_listed(tmp_path, threshold, layer):
    tokenizer = make_tokenizer("sentencepiece", tmp_path)
    model = make_model(replace(LLAMA, vocab_size=400), exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented, tokenizer)
    params = SamplingParams(
        mode="early_exit", early_exit_threshold=threshold, max_tokens=6, ignore_eos=True
    )
    at_submission, request = traced(lambda: engine.submit("def main", params))
    while not request.tokens:
        engine.step()
    found: set[str] = set()
    while not request.is_finished:
        passed = traced(engine.step)[0]
        # With the last token the request's memory is given back, too.
        found |= set() if request.is_finished else passed
    assert {token.exit_layer for token in request.tokens} == {layer}
    listed = ARCHITECTURE.partition("<!-- files of a token -->")[2].partition("<!-- end -->")[0]
    # Weights are only packed where PyTorch has oneDNN.
    found.add("inference/model/packed.py")
    assert found == set(re.findall(r"`([\w/]+\.py)`", listed))
    assert f"runs functions of {len(at_submission)} files when it is submitted" in ARCHITECTURE
    assert f"runs functions of {len(found)} files, whether" in " ".join(ARCHITECTURE.split())
