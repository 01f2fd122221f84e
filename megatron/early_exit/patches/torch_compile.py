"""Switches off `torch.compile` of Megatron's helpers: a CPU gains nothing from it, and compiling
takes longer than a short run."""

import importlib
import sys

import torch

from megatron.early_exit.patches.replace import replaced


def keep_functions_eager() -> None:
    """Keep Megatron's `torch.compile`d helpers eager."""
    if "megatron.core.jit" in sys.modules:
        torch.compiler.set_stance("force_eager")
        return
    # Megatron captures `torch.compile` by this import, which also decorates much of its core.
    with replaced(torch, "compile", lambda function: function, "model, ..."):
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
