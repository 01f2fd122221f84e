"""Functions to patch torch and Megatron, which replace a name only if it is what they expect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes a function and returns the one to call in its place."""

_MISSING = object()


def replace(owner: object, name: str, value: object, parameters: str | None = None) -> Any:
    """Set `owner.name`.

    Args:
        owner: a module, a class or an object of torch or Megatron.
        name: its attribute.
        value: the new value of the attribute.
        parameters: the expected names of the attribute's parameters, with "..." at the end for any
            others; None: those of `value`.

    Returns:
        The old value.

    Raises:
        RuntimeError: the attribute is gone, or is of another kind or has other parameters than
            expected.
    """
    if parameters is None:
        parameters = _parameters(value)
    original = _original(owner, name, _kind(value), parameters)
    setattr(owner, name, value)
    return original


def wrap(owner: object, name: str, wrapper: Wrapper, parameters: str | None = None) -> None:
    """Set `owner.name`, a function, to `wrapper` of it; `parameters` as in `replace`, but None for
    a function that is written in C and has no signature."""
    original = _original(owner, name, "function", parameters)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


@contextmanager
def replaced(
    owner: object, name: str, value: object, parameters: str | None = None
) -> Iterator[None]:
    """Set `owner.name` for the duration of a block; see `replace`."""
    original = replace(owner, name, value, parameters)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _original(owner: object, name: str, kind: str, parameters: str | None) -> Any:
    """Return `owner.name`, if it is of this kind and has these parameters."""
    original = getattr(owner, name, _MISSING)
    found, known = _kind(original), kind
    names = _parameters(original)
    if found == known and parameters is not None and names is not None:
        start = parameters.removesuffix("...")
        if names != parameters and (start == parameters or not f"{names}, ".startswith(start)):
            found, known = f"{found}({names})", f"{known}({parameters})"
    if found != known:
        label = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(
            f"{label}.{name} is {found}, expected: {known}; this version of torch or Megatron is "
            "not supported"
        )
    return original


def _kind(value: object) -> str:
    if value is _MISSING:
        return "not there"
    if isinstance(value, type):
        return "class"
    return "function" if callable(value) else type(value).__name__


def _parameters(value: object) -> str | None:
    """Names of the parameters; None for what is not callable or is written in C."""
    try:
        return ", ".join(inspect.signature(value).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
