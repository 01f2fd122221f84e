"""What must hold when Megatron has loaded a checkpoint and before the first step."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron.early_exit.model.exit_head import ExitHead
from megatron.early_exit.model.gpt_model import EarlyExitGPTModel

_EXTRA_STATE = "_extra_state"
_OF_HEAD = re.compile(r"(exits\.\d+|mtp)\.")


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded or saved; said in one sentence."""


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turn what Megatron and torch raise about checkpoints into `CheckpointError`."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise CheckpointError(
            f"the checkpoint is damaged or does not fit: {failures[0]}"
        ) from error
    except CheckpointingException as error:
        raise CheckpointError(f"the checkpoint does not fit: {error}") from error
    except (AssertionError, ValueError) as error:
        reason = str(error)
        if not reason.startswith(("OptimizerParamScheduler:", "Could not find parameter group")):
            raise
        raise CheckpointError(
            "the learning rate schedule in the checkpoint is another one "
            f"({reason.splitlines()[0]}): give "
            "--override-opt_param-scheduler to follow this run's flags, or "
            "--use-checkpoint-opt_param-scheduler to follow the checkpoint"
        ) from error


def load_all_but(chunks: list[EarlyExitGPTModel], fresh_exits: tuple[int, ...]) -> None:
    """Keep exits out of the model's next loading, and let it fail if anything else is missing.

    Megatron only prints what is missing, and trains on with random weights in its place. Its
    --dist-ckpt-strictness, which could also leave out what a checkpoint lacks, does not work with
    torch 2.15.

    Args:
        chunks: the model, not wrapped yet.
        fresh_exits: exits that are not in the checkpoint.
    """
    for chunk in chunks:
        heads = [head for position, head in chunk.exits.heads.items() if position in fresh_exits]
        for head in heads:
            head.__dict__["sharded_state_dict"] = _nothing
        loaded = _Loaded(heads, fresh_exits, exits_only=chunk.tunes_exits)
        chunk.register_load_state_dict_post_hook(loaded)  # type: ignore[no-untyped-call]


def _nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


class _Loaded:
    """Looks at what was not loaded, and lets the heads be saved again."""

    def __init__(
        self, heads: list[ExitHead], fresh_exits: tuple[int, ...], exits_only: bool
    ) -> None:
        self.heads = heads
        self.exits_only = exits_only
        self.may_lack = tuple(f"exits.{position}." for position in fresh_exits)

    def __call__(self, _: torch.nn.Module, keys: Any) -> None:
        for head in self.heads:
            head.__dict__.pop("sharded_state_dict", None)
        missing = [name for name in keys.missing_keys if not name.endswith(_EXTRA_STATE)]
        unknown = [name for name in missing if not name.startswith(self.may_lack)]
        if self.exits_only:
            unknown = [name for name in unknown if _OF_HEAD.match(name)]
        if unknown:
            raise CheckpointError(
                f"the checkpoint lacks {unknown[0]} and {len(unknown) - 1} more tensors that the "
                "flags of this run ask for"
            )
        keys.missing_keys.clear()


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
