"""The number format of an exit's branch: FP8 or FP4 where the backbone's layer at the exit has it.

Megatron opens Transformer Engine's contexts around its layers in their forward pass. A branch runs
in the backward phase, outside of them, and in evaluation inside that of the layer it hangs on; so
it opens one of its own, and is computed in the same format in both.
"""

from contextlib import AbstractContextManager

from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import HAVE_TE, get_fp8_context, is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig


def branch_context(config: TransformerConfig, position: int) -> AbstractContextManager[None]:
    """The format in which the branch of the exit at `position` is computed: that of the backbone's
    last layer before it, whatever the format around."""
    if HAVE_TE and (config.fp8 or config.fp4) and is_first_last_bf16_layer(config, position - 1):
        from transformer_engine.pytorch import fp8_autocast

        # With --pre-exit a branch is evaluated inside the context of the layer behind the exit.
        bf16: AbstractContextManager[None] = fp8_autocast(enabled=False)
        return bf16
    return _layer_context(config, position, is_init=False)


def branch_init_context(config: TransformerConfig, position: int) -> AbstractContextManager[None]:
    """The format of the branch's parameters (FP8 with --fp8-param-gather), as of those of the
    backbone's last layer before the exit at `position`."""
    return _layer_context(config, position, is_init=True)


def _layer_context(
    config: TransformerConfig, position: int, is_init: bool
) -> AbstractContextManager[None]:
    get_context = get_fp4_context if config.fp4 else get_fp8_context
    context: AbstractContextManager[None] = get_context(config, position - 1, is_init=is_init)
    return context
