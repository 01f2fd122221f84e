"""Finds the flags of Megatron that are read by code which a training run of this package reaches,
in the syntax trees of the installed Megatron and of this package."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import megatron.core
import megatron.training

import megatron.early_exit

CORE, TRAINING, OURS = (
    Path(str(package.__file__)).parent
    for package in (megatron.core, megatron.training, megatron.early_exit)
)

# Parts of Megatron that a run does not reach, or that only declare, check or copy flags.
UNREACHED = [
    *(CORE / name for name in ("inference", "export", "ssm", "post_training", "resharding")),
    *(
        CORE / "models" / name
        for name in ("T5", "bert", "hybrid", "huggingface", "mimo", "multimodal", "vision")
    ),
    *(TRAINING / name for name in ("config", "arguments.py", "argument_utils.py")),
    *(TRAINING / name for name in ("yaml_arguments.py", "theoretical_memory_usage.py")),
    TRAINING / "models" / "hybrid.py",
    *(TRAINING / "datasets" / name for name in ("fim_dataset.py", "sft_dataset.py")),
    OURS / "training" / "cli" / "flag_rules",
    *(OURS / name for name in ("inference", "server", "client", "schedules", "planner")),
    OURS / "checkpoint",
]

# What configurations and parsed arguments are called.
_HOLDER = re.compile(r"(args|config|cfg|cfg_container)$")


def read_flags(names: Collection[str]) -> set[str]:
    """Those of `names` that some reachable function reads from arguments or a configuration."""
    found: set[str] = set()
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        found.update(_reads(ast.parse(text), names))
    return found


def _sources() -> Iterator[Path]:
    for folder in (CORE, TRAINING, OURS):
        for path in folder.rglob("*.py"):
            if not any(path.is_relative_to(unreached) for unreached in UNREACHED):
                yield path


def _reads(tree: ast.AST, names: Collection[str]) -> Iterator[str]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            # Checks and derives other fields.
            continue
        if isinstance(node, ast.Attribute):
            if node.attr in names and isinstance(node.ctx, ast.Load) and _holds_flags(node.value):
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in names:
                yield name.value
        waiting.extend(ast.iter_child_nodes(node))


def _holds_flags(node: ast.expr) -> bool:
    """Whether an expression is arguments or a configuration, or a part of one."""
    while isinstance(node, ast.Attribute):
        if _HOLDER.search(node.attr):
            return True
        node = node.value
    return isinstance(node, ast.Name) and bool(_HOLDER.search(node.id))
