"""The project's own machinery: finding Python, the set-up, the checks, and that they do check."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.speed import patient

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "tools" / "setup"
BIN = Path(sys.executable).parent
LOCK = ROOT / "requirements.lock"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(
    *command: str | Path, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in this environment less what a surrounding `make` says to a nested one."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patient(280),
    )


# --- finding a Python ------------------------------------------------------------------------


@pytest.fixture
def find_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The finder, on a machine whose only interpreters lie in `bin`, `shims` and pyenv's folder."""

    def find(**environment: str) -> subprocess.CompletedProcess[str]:
        # The shell tools that the finder calls, and none of this machine's interpreters.
        for tool in ("bash", "awk", "sed", "tr", "cat"):
            link = tmp_path / "tools" / tool
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(shutil.which(tool) or tool)
        machine = {
            "PATH": f"{tmp_path}/shims:{tmp_path}/bin:{tmp_path}/tools",
            "HOME": str(tmp_path / "home"),
            "PYENV_ROOT": "",
            "PYTHON": "",
        }
        return run("bash", SETUP / "find_python.sh", **(machine | environment))

    return find


def fake_python(path: Path, answer: str, status: int = 0) -> Path:
    """Writes an interpreter that answers the finder's question with `answer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\necho '{answer}'\necho '{path}'\nexit {status}\n")
    path.chmod(0o755)
    return path


def test_finder_takes_a_supported_python_from_the_path(tmp_path, find_python):
    fake_python(tmp_path / "bin" / "python3", "3.11")
    wanted = fake_python(tmp_path / "bin" / "python3.12", "3.12")
    found = find_python()
    assert (found.returncode, found.stdout) == (0, f"{wanted}\n")


def test_finder_looks_behind_a_shim_that_refuses(tmp_path, find_python):
    fake_python(tmp_path / "shims" / "python3.12", "pyenv: python3.12: command not found", 127)
    fake_python(tmp_path / "versions" / "3.11.7" / "bin" / "python", "3.11")
    wanted = fake_python(tmp_path / "versions" / "3.12.1" / "bin" / "python", "3.12")
    assert find_python().stdout == f"{wanted}\n"


@pytest.mark.parametrize("setting", ["HOME", "PYENV_ROOT"])
def test_finder_looks_among_the_versions_of_pyenv(tmp_path, find_python, setting):
    pyenv = tmp_path / "home" / ".pyenv" if setting == "HOME" else tmp_path / "elsewhere"
    wanted = fake_python(pyenv / "versions" / "3.13.0" / "bin" / "python", "3.13")
    environment = {} if setting == "HOME" else {"PYENV_ROOT": str(pyenv)}
    assert find_python(**environment).stdout == f"{wanted}\n"


def test_finder_prefers_the_version_that_is_tested_most(tmp_path, find_python):
    fake_python(tmp_path / "bin" / "python3", "3.13")
    wanted = fake_python(
        tmp_path / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", "3.12"
    )
    assert find_python().stdout == f"{wanted}\n"


def test_finder_says_what_to_install_when_there_is_none(tmp_path, find_python):
    fake_python(tmp_path / "bin" / "python3", "3.11")
    fake_python(tmp_path / "bin" / "python3.12", "3.12 without ensurepip")
    fake_python(tmp_path / "bin" / "python3.13", "not for you", status=1)
    found = find_python()
    assert found.returncode == 1
    assert found.stdout == ""
    assert "needs version 3.12 or 3.13" in found.stderr
    assert "bin/python3: Python 3.11" in found.stderr
    assert "bin/python3.12: Python 3.12 without ensurepip" in found.stderr
    assert "bin/python3.13: does not run" in found.stderr
    assert "apt install python3.12" in found.stderr


def test_finder_takes_only_the_interpreter_it_is_told_to(tmp_path, find_python):
    fake_python(tmp_path / "bin" / "python3.12", "3.12")
    old = fake_python(tmp_path / "old" / "python", "3.9")
    found = find_python(PYTHON=str(old))
    assert found.returncode == 1
    assert f"{old}: Python 3.9" in found.stderr


def test_finder_answers_for_real_interpreters():
    found = run("bash", SETUP / "find_python.sh", PYTHON=sys.executable)
    assert found.returncode == 0, found.stderr
    asked = run(found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])")
    assert asked.stdout.strip() == str(sys.version_info[:2])


def test_finder_and_metadata_name_the_same_versions():
    supported = re.search(r'^supported="(.*)"$', (SETUP / "find_python.sh").read_text(), re.M)
    prefix = "Programming Language :: Python :: "
    classifiers = PYPROJECT["project"]["classifiers"]
    named = [line.removeprefix(prefix) for line in classifiers if line.startswith(prefix)]
    assert supported is not None
    assert supported[1].split() == named


# --- the environment -------------------------------------------------------------------------


def test_requirements_admit_what_is_installed():
    project = PYPROJECT["project"]
    # What benchmarks compare with is not installed by the set-up.
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "benchmark"}
    groups = [project["dependencies"], *extras.values()]
    for requirement in map(Requirement, itertools.chain(*groups)):
        assert any(clause.operator == "<" for clause in requirement.specifier), requirement
        assert requirement.specifier.contains(version(requirement.name)), requirement


@pytest.mark.parametrize("module", ["megatron.core", "megatron.training", "megatron.early_exit"])
def test_megatron_and_its_extension_import_from_anywhere(module, tmp_path):
    code = f"import importlib.util; print(importlib.util.find_spec('{module}').origin)"
    found = run(sys.executable, "-c", code, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).name == "__init__.py"


@pytest.fixture
def offline_setup(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The set-up of a bare copy of the project, where pip cannot reach anything."""
    shutil.copytree(SETUP, tmp_path / "tools" / "setup")
    for name in ("pyproject.toml", "setup.py", LOCK.name):
        shutil.copy(ROOT / name, tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHON": sys.executable}
    return ["bash", str(tmp_path / "tools" / "setup" / "make_venv.sh")], offline


def test_failed_setup_says_so_and_is_not_taken_for_done(tmp_path, offline_setup):
    command, offline = offline_setup
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number in (version("setuptools"), "999"):
        info = f"setuptools-{number}.dist-info"
        with zipfile.ZipFile(wheels / f"setuptools-{number}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Name: setuptools\nVersion: {number}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
            wheel.writestr(f"{info}/RECORD", "")
    made = run(*command, **{**offline, "PIP_FIND_LINKS": str(wheels)})
    assert made.returncode == 1
    # It was the lock that chose among the two.
    found = [info.name for info in tmp_path.glob(".venv/lib/*/site-packages/setuptools*")]
    assert found == [f"setuptools-{version('setuptools')}.dist-info"]
    assert "error: pip could not install the project" in made.stderr
    assert not (tmp_path / ".venv" / ".setup-done").exists()


def test_killed_setup_starts_anew(tmp_path, offline_setup):
    command, offline = offline_setup
    killed = subprocess.Popen(
        command, env=os.environ | offline, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not (tmp_path / ".venv" / "bin").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / ".venv" / ".setup-done").exists()
    left_over = tmp_path / ".venv" / "left-over"
    left_over.touch()
    made = run(*command, **offline)
    assert "Building .venv anew: an earlier setup was interrupted" in made.stdout
    assert not left_over.exists()


@pytest.fixture
def check_venv() -> ModuleType:
    """The module that looks through an environment's requirements."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("check_venv", SETUP / "check_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_package(site: Path, name: str, version: str, requires: str = "", record: str = ""):
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires.splitlines()]
    (info / "METADATA").write_text("\n".join(lines))
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{record}")


def test_damaged_environment_is_noticed(tmp_path, check_venv, monkeypatch):
    lock = tmp_path / "ee.lock"
    lock.write_text(
        "# Pins\nee-a==2.0\nee-b==1.1 ; python_version >= '3'\nee-b==1.0 ; os_name == ''"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    write_package(tmp_path, "megatron_early_exit", "0.1.0", "ee-a>=1,<2\nee-b; extra == 'dev'")
    write_package(tmp_path, "ee_a", "2.0", "ee-c\nee-d")
    write_package(tmp_path, "ee_d", "1.0")
    write_package(tmp_path, "ee_b", "1.0", record="ee_b/__init__.py,,\n")
    assert set(check_venv.faults(lock)) == {
        "ee-a 2.0 is installed, <2,>=1 is needed",
        "ee-b is installed in part",
        "ee-b 1.0 is installed, ee.lock has 1.1",
        "ee-c is not installed",
        "ee-d is not in ee.lock: run make lock",
    }


SYSTEMS = [
    {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.1"}
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.12", "3.13")
]


def test_lock_pins_every_requirement_once_within_its_range():
    """On each system that it is for; in lines that say nothing of where packages come from."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [\w '\"().=<>!]+)?", line), line
    pins = [Requirement(line) for line in lines]
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for wanted in map(Requirement, itertools.chain(*groups)):
        same = [pin for pin in pins if pin.name == canonicalize_name(wanted.name)]
        for system in SYSTEMS:
            valid = [pin for pin in same if pin.marker is None or pin.marker.evaluate(system)]
            assert len(valid) == 1, wanted
            (pinned,) = valid[0].specifier
            assert wanted.specifier.contains(pinned.version), valid[0]


def test_everything_installed_is_what_the_lock_says():
    checked = run(sys.executable, "-E", SETUP / "check_venv.py")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_another_lock_is_installed_anew(tmp_path):
    """What the set-up remembers an environment by depends on the lock."""
    source = (SETUP / "make_venv.sh").read_text()
    names, function = (
        "\n".join(re.findall(pattern, source, re.MULTILINE | re.DOTALL))
        for pattern in (r"^lock=\S+$", r"^fingerprint\(\) \{\n.*?^\}$")
    )
    for name in ("pyproject.toml", "setup.py", LOCK.name):
        shutil.copy(ROOT / name, tmp_path)
    script = f"set -eu; cd {tmp_path}; here={SETUP}; root=r\n{names}\n{function}\nfingerprint"
    seen = [run("bash", "-c", script).stdout]
    with (tmp_path / LOCK.name).open("a") as lock:
        lock.write("another==1.0\n")
    seen += [run("bash", "-c", script).stdout]
    assert seen[0].startswith("r\n")
    assert seen[0] != seen[1]


# --- the checks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "tools"),
    [("lint", ("ruff", "codespell")), ("types", ("mypy",)), ("imports", ("lint-imports",))],
)
def test_check_passes(check, tools):
    """A check is a test, so that the closing lines of `make test` tell of every fault."""
    if missing := [tool for tool in tools if not (BIN / tool).exists()]:
        pytest.skip(f"{missing[0]} is not installed in this environment")
    made = run("make", "--no-print-directory", "--old-file=setup", f"BIN={BIN}", check)
    assert made.returncode == 0, f"make {check}:\n{made.stdout}{made.stderr}"


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A copy of the package and its configuration, to plant faults in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = Path("megatron", "early_exit")
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
    return tmp_path / package


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("config", "model"),
        ("model", "training"),
        ("model", "platform"),
        ("hardware", "config"),
        ("patches", "hardware"),
        ("checkpoint", "inference"),
        ("inference", "training"),
        ("inference", "schedules"),
        ("inference", "planner"),
        ("inference", "evaluation"),
        ("server", "evaluation"),
        ("schedules", "planner"),
        ("server", "client"),
        ("training", "platform"),
    ],
)
def test_import_contract_forbids(package_copy, importer, imported):
    lint_imports = BIN / "lint-imports"
    if not lint_imports.exists():
        pytest.skip("lint-imports is not installed in this environment")
    for name in (importer, imported):
        if not (package_copy / f"{name}.py").exists():
            (package_copy / name).mkdir(exist_ok=True)
            (package_copy / name / "__init__.py").touch()
    package = package_copy / importer
    planted = package / "planted.py" if package.is_dir() else package.with_suffix(".py")
    with planted.open("a") as file:
        file.write(f"import megatron.early_exit.{imported}\n")
    linted = run(lint_imports, "--no-logo", "--no-cache", cwd=package_copy.parents[1])
    arrow = rf"early_exit\.{importer}(\.planted)? -> megatron\.early_exit\.{imported}"
    assert linted.returncode == 1
    assert re.search(arrow, " ".join(linted.stdout.split()))


def test_import_contract_sees_every_folder():
    """Without an `__init__.py`, a folder would escape the contract, and the installed package."""
    package = ROOT / "megatron" / "early_exit"
    folders = {module.parent for module in package.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert not (package.parent / "__init__.py").exists()


def test_type_checker_sees_all_that_is_run(package_copy):
    mypy = BIN / "mypy"
    if not mypy.exists():
        pytest.skip("mypy is not installed in this environment")
    root = package_copy.parents[1]
    shutil.rmtree(package_copy)
    planted = ["pretrain_early_exit_gpt.py"]
    for folder in ("megatron/early_exit", "tools", "examples", "benchmarks"):
        (root / folder).mkdir()
        planted.append(f"{folder}/planted_in_{Path(folder).name}.py")
    for name in planted:
        (root / name).write_text("def f(x: int) -> str:\n    return x\n\n\ndef g(x): ...\n")
    checked = run(mypy, "--cache-dir=/dev/null", cwd=root)
    assert checked.returncode == 1
    for name in planted:
        assert f"{name}:2: error: Incompatible return value type" in checked.stdout
        assert f"{name}:5: error: Function is missing a type annotation" in checked.stdout
