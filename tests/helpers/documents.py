"""The commands in README and `docs/`: which ones a test runs, and how long ones are shortened."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import as_flag
from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.server.settings import ServerSettings

REPOSITORY = Path(__file__).resolve().parents[2]
IN_FULL = "EARLY_EXIT_DOCS_IN_FULL"
"""Environment variable by which commands run as they stand in the documents, however long."""
SHORT_ENVIRONMENT = {
    "DEMO_STEPS": "12",
    "DEMO_MINUTES": "1",
    "DEMO_COMPILE": "0",
    "MY_HOUR_STEPS": "12",
}
"""What makes the demo short: its figures do not matter to a test."""
SHORT_FLAGS = {
    "tools/evaluate.py": "--items 1 --max-tokens 8 --thresholds 0.5 0 --repeats 1 --no-compile",
}
"""Flags that are put behind those of a tool: fewer things to measure. Where a flag is given twice
the last one counts. Commands that begin with a verb are left as they are."""

DESCRIBED = (EarlyExitConfig, SamplingParams, ServerSettings)
"""Classes from whose fields flags are made."""
FOREIGN_FLAGS = ("add_exit_layer_nums", "max_eval_instances", "nodes")
"""Flags of other programs."""

_BLOCK = re.compile(
    r"(?:^<!-- not run:(?P<reason>.*?)-->\n)?^```(?P<kind>bash|python)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
_END_OF_COMMAND = re.compile(r"[;&|<>()]+$")


@dataclass(frozen=True)
class Block:
    """Commands, or Python, in a document.

    Attributes:
        page: the document, from the root of the repository.
        kind: `bash` or `python`.
        text: what is between its fences.
        reason: why no test runs it; None if one does.
    """

    page: str
    kind: str
    text: str
    reason: str | None

    def command(self) -> list[str]:
        """The command that runs it in a copy of the repository."""
        if self.kind == "python":
            return [".venv/bin/python", "-c", self.text]
        # The environment is the test's own; to set it up again takes minutes and a network.
        text = re.sub(r"^make ", "make -o setup ", self.text, flags=re.MULTILINE)
        if not is_in_full():
            for tool, flags in SHORT_FLAGS.items():
                line = rf"({re.escape(tool)} --(?:[^\n\\]|\\\n)*)"
                text = re.sub(line, lambda found, more=flags: f"{found[1]} {more}", text)
        return ["bash", "-euo", "pipefail", "-c", text]


def is_in_full() -> bool:
    """Whether commands are to run as they stand."""
    return os.environ.get(IN_FULL, "0") not in ("", "0")


def pages(repository: Path = REPOSITORY) -> list[str]:
    """Documents whose commands are run, README first: it makes the model that others use."""
    found = sorted((repository / "docs").rglob("*.md"))
    return ["README.md", *(str(path.relative_to(repository)) for path in found)]


def blocks(page: str, repository: Path = REPOSITORY) -> list[Block]:
    """The blocks of a document, in order."""
    return blocks_of((repository / page).read_text(), page)


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a document's text, in order."""
    found = []
    for block in _BLOCK.finditer(text):
        reason = block["reason"]
        reason = None if reason is None else reason.strip()
        found.append(Block(page, block["kind"], block["text"], reason))
    return found


def programs(text: str) -> Iterator[tuple[str, list[str]]]:
    """The Python files that a block of bash runs, each with its arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for position, word in enumerate(words):
            if word.endswith(".py"):
                yield word, list(_arguments(words[position + 1 :]))


def _arguments(words: list[str]) -> Iterator[str]:
    """Words up to the end of a command, without what the shell would put in."""
    for word in words:
        if _END_OF_COMMAND.match(word) or word.startswith((">", "2>")):
            return
        if "$" not in word:
            yield word.removesuffix(";")
        if word.endswith(";"):
            return


@cache
def known_flags() -> set[str]:
    """Flags that a file of the repository gives or takes, and those that are made from fields, here
    and in Megatron."""
    megatron = find_spec("megatron.training")
    (training,) = megatron.submodule_search_locations
    (core,) = find_spec("megatron.core").submodule_search_locations
    made = [*Path(training, "config").glob("*.py"), Path(core, "transformer/transformer_config.py")]
    made.append(Path(core, "model_parallel_config.py"))
    made += [
        REPOSITORY / "megatron" / "early_exit" / "training" / name
        for name in (
            *("loop/filling_options.py", "loop/holding_options.py", "loss/curriculum.py"),
            "tuning/options.py",
        )
    ]
    options = ["help", *FOREIGN_FLAGS]
    options += [field.name for kind in DESCRIBED for field in fields(kind)]
    for path in made:
        options += re.findall(r"^    (\w+): .*=", path.read_text(), re.MULTILINE)
    paths = [Path(training, "arguments.py")]
    for folder in ("tools", "examples", "benchmarks", "megatron"):
        paths += (REPOSITORY / folder).rglob("*.py")
    quoted = re.compile(r"""["'](--[a-z][\w-]+)["']""")
    either = re.compile(r"""["']--([a-z][\w-]+)["'],\s+action=argparse.BooleanOptionalAction""")
    texts = [path.read_text() for path in paths]
    written = {flag for text in texts for flag in quoted.findall(text)}
    written |= {f"--no-{name}" for text in texts for name in either.findall(text)}
    # Megatron makes two flags of a field that is on or off.
    options += [f"no_{name}" for name in options]
    return written | set(map(as_flag, options))
