"""Torch and Megatron are changed in `patches/` alone, read from the syntax tree of every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megatron" / "early_exit"
LIBRARIES = ("torch", "megatron.core", "megatron.training")
TOOL = "megatron.early_exit.patches.replace"

# Functions that change an attribute of their first argument, or the name that is written in it;
# those of pytest and unittest.mock too.
SETTER = re.compile(r"(.*\.)?(__)?(setattr|delattr|setitem|delitem|patch(\.\w+)?)(__)?")


def changes_outside(source: str) -> list[int]:
    """Lines of a file that change an attribute of torch or Megatron."""
    tree = ast.parse(source)
    names = Names(tree)
    return sorted({node.lineno for node in ast.walk(tree) if names.is_change(node)})


class Names:
    """What names in a file stand for, whichever function they are bound in."""

    def __init__(self, tree: ast.AST) -> None:
        self.meaning: dict[str, str] = {}
        known = -1
        # Until names of names are known too.
        while known < len(self.meaning):
            known = len(self.meaning)
            for node in ast.walk(tree):
                for name, meaning in self._bound(node):
                    if is_library(meaning) or isinstance(node, ast.Import | ast.ImportFrom):
                        self.meaning.setdefault(name, meaning)

    def _bound(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        match node:
            case ast.Import():
                for one in node.names:
                    first = one.name.partition(".")[0]
                    yield (one.asname, one.name) if one.asname else (first, first)
            case ast.ImportFrom(level=0):
                for one in node.names:
                    yield one.asname or one.name, f"{node.module}.{one.name}"
            case ast.Assign():
                for target in node.targets:
                    yield from self._assigned(target, node.value)
            case ast.AnnAssign(value=ast.expr()) | ast.NamedExpr():
                yield from self._assigned(node.target, node.value)
            case ast.For() | ast.comprehension():
                for value in getattr(node.iter, "elts", ()):
                    yield from self._assigned(node.target, value)
            case ast.withitem(optional_vars=ast.expr()):
                yield from self._assigned(node.optional_vars, node.context_expr)

    def _assigned(self, target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its_value in zip(target.elts, value.elts, strict=False):
                yield from self._assigned(one, its_value)
        elif isinstance(target, ast.Name) and (meaning := self.resolve(value)):
            yield target.id, meaning

    def resolve(self, node: ast.expr) -> str | None:
        """The dotted name of a module, class or function, as far as it can be read."""
        match node:
            case ast.Name():
                return self.meaning.get(node.id)
            case ast.Attribute():
                owner = self.resolve(node.value)
                return owner and f"{owner}.{node.attr}"
            case ast.Call(func=ast.Name("getattr" | "vars"), args=[owner, *_]):
                return self.resolve(owner)
            case ast.Call(args=[ast.Constant(str() as name), *_]):
                return name if "import" in ast.unparse(node.func) else None
            case ast.Subscript(
                value=ast.Attribute(attr="modules"), slice=ast.Constant(str() as name)
            ):
                return name
        return None

    def is_change(self, node: ast.AST) -> bool:
        """Whether a node changes something of a library, or imports what is made for that."""
        match node:
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                return is_library(self.resolve(node.value))
            case ast.Subscript(ctx=ast.Store() | ast.Del()):
                return is_library(self.resolve(node.value))
            case ast.Call(func=ast.Attribute(value=owner, attr="update" | "setdefault" | "pop")):
                return is_library(self.resolve(owner))
            case ast.Call(args=[target, *_]) if SETTER.fullmatch(ast.unparse(node.func)):
                written = target.value if isinstance(target, ast.Constant) else None
                return is_library(self.resolve(target)) or is_library(written)
            case ast.ImportFrom(level=0):
                return TOOL in (node.module, *(f"{node.module}.{one.name}" for one in node.names))
            case ast.Import():
                return TOOL in [one.name for one in node.names]
        return False


def is_library(name: object) -> bool:
    return isinstance(name, str) and f"{name}.".startswith(tuple(f"{one}." for one in LIBRARIES))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.compile = None",
        "import torch\ntorch.cuda.is_available = lambda: True",
        "import torch.cuda as cuda\ncuda.device_count = lambda: 1",
        "import torch\ntorch.backends.cudnn.benchmark: bool = True",
        "import torch\ntorch.manual_seed += 1",
        "import torch\ndel torch.compile",
        "import torch\na, torch.compile = 1, 2",
        "import torch\nfor torch.compile in (): pass",
        "import torch\nwith open('f') as torch.compile: pass",
        "import torch\nsetattr(torch, 'compile', None)",
        "import torch\ndelattr(torch.Tensor, 'cuda')",
        "import torch\ntype.__setattr__(torch.Tensor, 'cuda', None)",
        "import torch\ntorch.__dict__['compile'] = None",
        "import torch\nvars(torch)['compile'] = None",
        "import torch\nvars(torch).update(compile=None)",
        "import torch\ntorch.Tensor.__dict__.pop('cuda')",
        "from torch import Tensor\nTensor.cuda = None",
        "from torch.nn import Module as M\nM.cuda = None",
        "import megatron.core.jit\nmegatron.core.jit.jit_fuser = None",
        "from megatron.training import training\ntraining.evaluate = None",
        "def f():\n    from megatron.training import training\n    training.evaluate = None",
        "from megatron.core.optimizer import distrib_optimizer as d\nd.Class.method = None",
        "import torch\ncuda = torch.cuda\ncuda.device_count = None",
        "import torch\ndef f():\n    b = a.c\na = torch.cuda\nb.d = None",
        "import torch\na, b = 1, torch.cuda\nb.device_count = None",
        "import torch\nfor module in (torch.cuda, torch.nn):\n    module.x = None",
        "import torch\nf(c := torch)\nc.x = 1",
        "import importlib\nm = importlib.import_module('megatron.training.arguments')\nm.print = 1",
        "from importlib import import_module\nimport_module('torch.cuda').x = 1",
        "import sys\nsys.modules['torch.cuda'].x = 1",
        "import torch\ngetattr(torch, 'cuda').x = 1",
        "import torch\ndef f(monkeypatch):\n    monkeypatch.setattr(torch, 'compile', None)",
        "def f(monkeypatch):\n    monkeypatch.setattr('torch.compile', None)",
        "from unittest import mock\nwith mock.patch('megatron.training.training.evaluate'): pass",
        "import torch\nfrom unittest.mock import patch\npatch.object(torch, 'compile')",
        "from megatron.early_exit.patches.replace import wrap",
        "from megatron.early_exit.patches import replace",
        "import megatron.early_exit.patches.replace",
    ],
)
def test_change_is_found(source) -> None:
    assert changes_outside(source) == [source.count("\n") + 1]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.zeros(3)\nx[0] = 1\nx.grad = None",
        "import torch\nclass Own(torch.nn.Module):\n    def f(self): self.x = torch.nn.Linear",
        "import torch\nclass Own(torch.nn.Module): pass\nOwn.x = torch.compile",
        "import torch\nmodel.hook = torch.compile",
        "import torch\nsetattr(model, 'dtype', torch.float32)",
        "import torch\ntorch.set_num_threads(1)",
        "from megatron.training import get_args\nget_args().seed = 1",
        "from megatron.training import training\nevaluate = training.evaluate",
        "import megatron.early_exit.config\nmegatron.early_exit.config.x = 1",
        "import torchvision\ntorchvision.x = 1",
        "from dataclasses import replace\nimport torch\nreplace(config, dtype=torch.float32)",
        "from megatron.early_exit.patches.messages import silence\nsilence()",
        "import os\nos.environ['A'] = 'torch'",
    ],
)
def test_other_things_are_not_found(source) -> None:
    assert changes_outside(source) == []


def test_torch_and_megatron_are_changed_in_their_room_alone() -> None:
    """Also by tools and examples."""
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "patches" not in path.parents]
    others = [*ROOT.glob("*.py")]
    for folder in ("tools", "examples", "benchmarks"):
        others += (ROOT / folder).rglob("*.py")
    assert len(files) > 200
    found = {
        str(path.relative_to(ROOT)): lines
        for path in files + others
        if (lines := changes_outside(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_changes_in_the_room_would_be_found_elsewhere() -> None:
    """Each file there but the messages' changes something, and is found by that."""
    room = {path.stem for path in (PACKAGE / "patches").glob("*.py")}
    found = {
        path.stem
        for path in (PACKAGE / "patches").glob("*.py")
        if changes_outside(path.read_text(encoding="utf-8"))
    }
    assert found == room - {"__init__", "replace", "messages"}
