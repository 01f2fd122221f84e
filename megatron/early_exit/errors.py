"""Values that are refused: which field, why, and what is allowed, as data.

The sentence is made where it is known how the user calls the field: a flag, a field of a JSON body,
or an argument in Python.
"""

from __future__ import annotations

_NOT_SHOWN = object()


class FieldError(ValueError):
    """A value that is refused.

    Args:
        field: the name of the field in Python.
        problem: what is wrong, as the rest of a sentence that begins with the field and its value.
        allowed: the range, or what else is allowed; None where the problem says it.
        value: the refused value; left out where the problem names what is wrong with it.

    Attributes:
        field, problem, allowed: as given.
        value: the value as text; None where it is left out.
    """

    def __init__(
        self,
        field: str,
        problem: str,
        allowed: str | None = None,
        *,
        value: object = _NOT_SHOWN,
    ) -> None:
        self.field, self.problem, self.allowed = field, problem, allowed
        self.value = None if value is _NOT_SHOWN else repr(value)
        super().__init__(self.named(field))

    def named(self, name: str) -> str:
        """The sentence about it, where the user calls the field `name`."""
        subject = f"{name}:" if self.value is None else f"{name} {self.value}"
        end = "" if self.allowed is None else f", allowed: {self.allowed}"
        return f"{subject} {self.problem}{end}"


def out_of_range(field: str, value: object, allowed: str) -> FieldError:
    """The refusal of a value that is not among what is allowed."""
    return FieldError(field, "is out of range", allowed, value=value)


def as_flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def one_line(error: BaseException) -> str:
    """What an error says, on one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
