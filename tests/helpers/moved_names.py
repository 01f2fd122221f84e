"""Breaks each name of torch and Megatron that a patch changes, and prints the patch's errors.

It has to run in a process of its own, in which nothing is patched yet. It prints a JSON list of
[module of the patch, changed name, what was done to the name, error or None]."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

from megatron.early_exit.patches import (
    dataset_helpers,
    distributed_optimizer,
    forward_backward,
    initialization,
    mtp_block_spec,
    optimizer_config,
    random_state,
    replace,
    token_dispatcher,
    torch_compile,
    torch_cuda,
    torch_tensors,
    training_log,
)


def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


def moved(first: Any, further: Any = None) -> None:
    pass


class Moved:
    def __init__(self, further: Any = None) -> None:
        pass


@wraps(mtp_block_spec.mtp_specs_by)
def build_by_other_specs() -> None:
    with mtp_block_spec.mtp_specs_by(wrapper):
        pass


PATCHES: tuple[Callable[[], None], ...] = (
    torch_cuda.answer_cuda_calls,
    torch_tensors.keep_tensors_on_cpu,
    torch_compile.keep_functions_eager,
    random_state.use_cpu_random_state,
    token_dispatcher.convert_split_sizes,
    initialization.initialize_without_cuda,
    dataset_helpers.skip_dataset_helper_build,
    distributed_optimizer.repair_torch_steps,
    distributed_optimizer.repair_fully_reshardable_format.__wrapped__,
    partial(forward_backward.train_by, print),
    partial(optimizer_config.set_learning_rates, {}),
    build_by_other_specs,
    partial(training_log.wrap_log, wrapper, wrapper, wrapper),
)


def changes_of(patch: Callable[[], None]) -> list[tuple[Any, str, Any]]:
    """Apply a patch and undo it; returns its changes as (owner, name, original)."""
    changes: list[tuple[Any, str, Any]] = []

    def record(owner: Any, name: str, value: Any) -> None:
        changes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    # It looks the built-in function up by name.
    replace.setattr = record
    try:
        # As in a process that has not imported it yet, for the patch of torch.compile.
        sys.modules.pop("megatron.core.jit", None)
        patch()
    finally:
        del replace.setattr
        for owner, name, original in reversed(changes):
            setattr(owner, name, original)
    # Of a temporary change the first half: the second undoes it.
    first = {(id(owner), name): (owner, name, old) for owner, name, old in reversed(changes)}
    return list(first.values())


def ways_to_break(owner: Any, name: str, original: Any) -> Iterator[str]:
    """Break a name in one way after the other, and yield a description of each."""
    setattr(owner, name, 7)
    yield "is of another kind"
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(original)
        setattr(owner, name, Moved if isinstance(original, type) else moved)
        yield "has other parameters"
    setattr(owner, name, original)
    delattr(owner, name)
    # Otherwise it is inherited.
    if not hasattr(owner, name):
        yield "is gone"
    setattr(owner, name, original)


def error_of(patch: Callable[[], None]) -> str | None:
    try:
        changes_of(patch)
    except RuntimeError as error:
        return str(error)
    return None


def main() -> None:
    found = []
    for patch in PATCHES:
        module = inspect.getmodule(getattr(patch, "func", patch)).__name__
        for owner, name, original in changes_of(patch):
            for way in ways_to_break(owner, name, original):
                found.append((module, name, way, error_of(patch)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
