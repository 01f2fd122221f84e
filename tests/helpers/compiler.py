"""Whether PyTorch can compile for the CPU here."""

import pytest

from megatron.early_exit.hardware.compiler import has_cpp_compiler

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="there is no C++ compiler")
