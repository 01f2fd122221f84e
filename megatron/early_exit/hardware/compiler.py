"""Whether PyTorch can compile for this machine's CPU."""

from __future__ import annotations

import os
import shutil
import sys


def has_cpp_compiler() -> bool:
    """Whether there is the C++ compiler that `torch.compile` calls: $CXX, else the system's usual
    one. PyTorch's own check is the same, after seconds of imports."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", usual)) is not None
