"""Skips the build of Megatron's data set helper: the wheel has it compiled, and without sources.

The build would end the process because there is no Makefile, with or without a GPU."""

import importlib

from megatron.core.datasets import utils

from megatron.early_exit.patches.replace import replace


def skip_dataset_helper_build() -> None:
    """Use the compiled helper of the wheel.

    Raises:
        ImportError: the wheel has none.
    """
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    replace(utils, "compile_helpers", lambda: None)
