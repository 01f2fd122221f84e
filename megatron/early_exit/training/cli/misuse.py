"""One sentence about an exception that a bad flag has caused somewhere inside Megatron.

Megatron refuses many values by an assertion without a text, or by whatever fails first. Which
flags are to blame is not guessed: they are the arguments and the fields of configurations that the
failing statement itself reads."""

import linecache
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from types import FrameType
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from megatron.early_exit.training.cli.arguments import add_early_exit_arguments
from megatron.early_exit.training.cli.given_flags import option_with_value

# Exceptions by which code says that a value is wrong.
_REFUSALS = (ValueError, AssertionError, OSError, RuntimeError, ImportError)

_FIELD = re.compile(r"\b(\w+)\.(\w+)\b")
_HOLDER = re.compile(r"(args|self|config|cfg)$")
_MOST_FLAGS = 4


def explain(error: BaseException) -> str | None:
    """What to tell whoever has given the flags, in one line; None where no flag is at fault."""
    message = " ".join(str(error).split())
    if "--" in message or (message and isinstance(error.__cause__, _REFUSALS)):
        # It names its flag, or was worded for the user where it was caught.
        return message
    frames = list(_frames(error))
    flags = next((found for frame, code in frames if (found := _flags(frame, code))), [])
    named = " ".join(flags[:_MOST_FLAGS])
    if isinstance(error, _REFUSALS):
        if not message:
            # An assertion without a text has its condition only.
            condition = frames[0][1].removeprefix("assert ") if frames else type(error).__name__
            message = f"the arguments do not fit together, required: {condition}"
        return f"{message} ({named})" if named else message
    if not named:
        return None
    return f"{named} cannot be used: {type(error).__name__}: {message}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, str]]:
    """The failing statement of each function on the way, the innermost first."""
    summaries = traceback.extract_tb(error.__traceback__)
    walked = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, summary in reversed(list(zip(walked, summaries, strict=True))):
        first = summary.lineno or 0
        numbers = range(first, (summary.end_lineno or first) + 1)
        code = "".join(linecache.getline(summary.filename, number) for number in numbers)
        yield frame, " ".join(code.replace("\\\n", " ").split())


def _flags(frame: FrameType, code: str) -> list[str]:
    """The flags that a statement reads, with their values."""
    found: dict[str, str] = {}
    for holder, name in _FIELD.findall(code):
        owner: Any = frame.f_locals.get(holder)
        if owner is None or not _HOLDER.search(holder) or not hasattr(owner, name):
            continue
        option = option_with_value(_parser(), name, getattr(owner, name))
        if option is not None:
            found.setdefault(name, option)
    return list(found.values())


def _parser() -> ArgumentParser:
    return add_early_exit_arguments(add_megatron_arguments(ArgumentParser(add_help=False)))
