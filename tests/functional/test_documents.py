"""README and the pages in docs/ are followed word for word, in a copy of the repository."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.documents import (
    REPOSITORY,
    SHORT_ENVIRONMENT,
    SHORT_FLAGS,
    Block,
    blocks,
    blocks_of,
    is_in_full,
    known_flags,
    pages,
    programs,
)
from tests.helpers.speed import patient
from tools.docs_site.flags_page import tool_parser

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    **({} if is_in_full() else SHORT_ENVIRONMENT),
}
MODEL = "demo/run/checkpoint"
BLOCKS = {page: blocks(page) for page in pages()}
NOT_RUN = [block for page in BLOCKS.values() for block in page if block.reason is not None]
LIMIT_S = 3600 if is_in_full() else patient(400)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the working tree, with the environment that the tests themselves run in."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Blocks that were run in the copy."""
    return set()


@pytest.fixture
def workplace(copy: Path) -> Iterator[Path]:
    """The copy, as the demo has left it: what a page makes for itself is called my_..., and is
    deleted behind it."""
    yield copy
    for path in copy.glob("my_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(block: Block, folder: Path) -> None:
    done = subprocess.run(
        block.command(),
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    said = f"{block.page}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, said
    assert "Traceback" not in done.stderr, said


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("page", [page for page, found in BLOCKS.items() if found])
def test_every_command_of_a_page_works(page, workplace, ran):
    if not (workplace / MODEL).exists():
        # The one command that all others need; a page alone (-k) has to run it as well.
        demo = Block("README.md", "bash", "make demo\n", None)
        run(demo, workplace)
        ran.add(demo.text)
        for name in ("losses.png", "tradeoff.png", "tradeoff.json"):
            assert (workplace / "demo" / name).stat().st_size > 200, name
    for block in BLOCKS[page]:
        # What another page has run word for word, and what a page does not make anew for itself.
        if block.reason is None and (block.text not in ran or "my_" in block.text):
            run(block, workplace)
            ran.add(block.text)


def test_readme_has_the_demo_and_python():
    texts = [block.text for block in BLOCKS["README.md"] if block.reason is None]
    assert "make demo\n" in texts
    assert any("EarlyExitEngine.from_checkpoint" in text for text in texts)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block.page}: {block.reason}")
def test_a_command_that_is_not_run_could_be(block):
    assert block.reason
    assert faults(block) == []


def faults(block: Block) -> list[str]:
    """What would keep a block from running whatever the machine: its syntax, files and flags."""
    if block.kind == "python":
        compile(block.text, block.page, "exec")
        return []
    checked = subprocess.run(
        ["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False
    )
    found = [checked.stderr] if checked.returncode else []
    for program, arguments in programs(block.text):
        path = REPOSITORY / program
        if not path.is_file():
            found.append(f"there is no {program}")
            continue
        parser = tool_parser(path) if path.parent.name == "tools" else None
        if parser is not None:
            try:
                parser.parse_args(arguments)
            except SystemExit:
                found.append(f"{program} refuses {' '.join(arguments)}")
        else:
            known = known_flags() | flags_of_lm_eval()
            flags = [one for one in arguments if one.startswith("--")]
            found += [f"{program} has no {one}" for one in flags if one not in known]
    return found


def flags_of_lm_eval() -> set[str]:
    """What the harness's command line takes, which tools/run_lm_eval.py hands on."""
    (folder,) = find_spec("lm_eval").submodule_search_locations
    texts = [path.read_text() for path in Path(folder, "_cli").glob("*.py")]
    return {flag for text in texts for flag in re.findall(r"""["'](--[a-z][\w-]+)["']""", text)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("for x in", "syntax error"),
        ("python tools/none.py --load x", "there is no tools/none.py"),
        ("python tools/checkpoint.py inspect", "refuses inspect"),
        ("python tools/generate.py --load x --prompt y --none | cat", "refuses"),
        ("torchrun \\\n  pretrain_early_exit_gpt.py --none 3 &", "has no --none"),
    ],
)
def test_faults_of_commands_that_are_not_run_are_found(text, found):
    (fault,) = faults(Block("page", "bash", text + "\n", "reason"))
    assert found in fault


def test_blocks_of_a_page():
    text = (
        "```bash\na\n```\n"
        "<!-- not run: GPU -->\n```python\nb\n```\n"
        "<!-- not run: -->\n```bash\nc\n```\n"
    )
    assert [(one.kind, one.text, one.reason) for one in blocks_of(text, "page")] == [
        ("bash", "a\n", None),
        ("python", "b\n", "GPU"),
        ("bash", "c\n", ""),
    ]


def test_long_commands_are_shortened_unless_the_switch_says_otherwise(monkeypatch):
    text = "python tools/evaluate.py --load a \\\n    --items 9\nmake demo\n"
    text += "python tools/evaluate.py report a\n"
    flags = SHORT_FLAGS["tools/evaluate.py"]
    block = Block("page", "bash", text, None)
    monkeypatch.delenv("EARLY_EXIT_DOCS_IN_FULL", raising=False)
    short = block.command()[-1]
    last = "python tools/evaluate.py report a"
    assert short.splitlines()[1:] == [f"    --items 9 {flags}", "make -o setup demo", last]
    monkeypatch.setenv("EARLY_EXIT_DOCS_IN_FULL", "1")
    assert block.command()[-1] == text.replace("make demo", "make -o setup demo")


@pytest.mark.parametrize("tool", SHORT_FLAGS)
def test_flags_that_shorten_are_the_tools_own(tool):
    parser = tool_parser(REPOSITORY / tool)
    assert parser is not None
    known = {name for action in parser._actions for name in action.option_strings}
    given = [word for word in SHORT_FLAGS[tool].split() if word.startswith("--")]
    assert given
    assert set(given) <= known
