"""What must hold when Megatron has loaded a checkpoint and before the first step."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

_EXTRA_STATE = "_extra_state"


def require_all_but(chunks: list[MegatronModule], fresh_exits: tuple[int, ...]) -> None:
    """Make the model's loading fail if anything but the given exits is missing.

    Megatron only prints what is missing, and trains on with random weights in its place.

    Args:
        chunks: the model, not wrapped yet.
        fresh_exits: exits that may be missing, as a whole.
    """
    may_lack = tuple(f"exits.{position}." for position in fresh_exits)

    def check(_: torch.nn.Module, keys: Any) -> None:
        missing = [name for name in keys.missing_keys if not name.endswith(_EXTRA_STATE)]
        unknown = [name for name in missing if not name.startswith(may_lack)]
        if unknown:
            raise ValueError(
                f"the checkpoint lacks {unknown[0]} and {len(unknown) - 1} more tensors that the "
                "flags of this run ask for"
            )
        keys.missing_keys.clear()

    for chunk in chunks:
        chunk.register_load_state_dict_post_hook(check)


class LoadedRandomState:
    """Keeps the host's random state as it was loaded while data loaders are built.

    A data loader draws its seed from that state when it is built. In an uninterrupted run that
    was before the first step, in a resumed one it is after the checkpoint's state was restored;
    without a GPU, dropout draws from the same state.
    """

    def __init__(self) -> None:
        self._state: torch.Tensor | None = None

    def keep(self) -> None:
        """Remember the state; once loaded, before the data loaders are built."""
        if self._state is None:
            self._state = torch.get_rng_state()

    def restore(self) -> None:
        """Put back what was remembered, if anything was, once."""
        if self._state is not None:
            torch.set_rng_state(self._state)
            self._state = None
