"""SmolLM2-135M-Instruct: a real language model, small enough for tests.

It comes as a GGUF file inside a Python package, which `make setup` installs.
"""

from examples.ee_tuning.smollm2.run import PACKAGE, find_gguf

__all__ = ["PACKAGE", "find_gguf"]
