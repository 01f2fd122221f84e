"""Changes the specs from which Megatron's builder of GPTs makes the multi-token-prediction module.

A model's configuration names the specs of its decoder's layers, but not those of this module."""

from contextlib import AbstractContextManager
from typing import Any

from megatron.training.models import gpt

from megatron.early_exit.patches.replace import Wrapper, replaced

_PARAMETERS = "config, transformer_layer_spec, vp_stage"


def mtp_specs_by(wrapper: Wrapper) -> AbstractContextManager[None]:
    """While models are built, ask `wrapper` of Megatron's function for the specs."""
    megatrons: Any = getattr(gpt, "mtp_block_spec", None)
    return replaced(gpt, "mtp_block_spec", wrapper(megatrons), _PARAMETERS)
