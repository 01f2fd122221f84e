"""The one way in which this package changes something that belongs to torch or Megatron."""

from __future__ import annotations


def replace(owner: object, name: str, value: object) -> None:
    """Set `owner.name`.

    Raises:
        RuntimeError: there is no such attribute any more, so that replacing it would do nothing.
    """
    if not hasattr(owner, name):
        label = getattr(owner, "__name__", repr(owner))
        raise RuntimeError(
            f"{label} has no attribute {name!r}: this version of torch or Megatron is not supported"
        )
    setattr(owner, name, value)
