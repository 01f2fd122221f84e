"""Whether PyTorch can compile for the CPU here."""

import os
import shutil
import sys

import pytest


def has_cpp_compiler() -> bool:
    """Whether there is the C++ compiler that `torch.compile` calls: $CXX, else the system's usual
    one. PyTorch's own check is the same, after seconds of imports."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", usual)) is not None


needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="there is no C++ compiler")
