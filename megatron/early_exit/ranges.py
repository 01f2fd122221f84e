"""The numbers that a field may have, and the refusal of all others."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TypeGuard

from megatron.early_exit.errors import FieldError, as_flag, out_of_range

_NAMES = {-(2**63): "-2**63", 2**63 - 1: "2**63 - 1", 2**64 - 1: "2**64 - 1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Allowed numbers. Infinity and NaN are never among them.

    Attributes:
        least: the lower end, in the unit of the field.
        most: the upper end, in the same unit; infinity is no limit.
        excludes_least, excludes_most: the end itself is not allowed.
        is_integer: only whole numbers are allowed.
        least_means, most_means: what the end stands for, shown in brackets behind it.
    """

    least: float
    most: float = math.inf
    excludes_least: bool = False
    excludes_most: bool = False
    is_integer: bool = False
    least_means: str = ""
    most_means: str = ""

    def __contains__(self, value: object) -> bool:
        if not _is_number(value) or (self.is_integer and not isinstance(value, int)):
            return False
        if not self.least <= value <= self.most:
            return False
        if not self.is_integer and abs(value) > sys.float_info.max:
            return False
        is_excluded = {self.least: self.excludes_least, self.most: self.excludes_most}
        return not is_excluded.get(value, False)

    def __str__(self) -> str:
        least, most = _shown(self.least, self.least_means), _shown(self.most, self.most_means)
        if self.most == math.inf:
            return f"above {least}" if self.excludes_least else f"{least} or more"
        if self.excludes_least:
            return f"above {least}, {'less than' if self.excludes_most else 'up to'} {most}"
        return f"{least} to less than {most}" if self.excludes_most else f"{least} to {most}"

    def check(self, **values: object) -> None:
        """Refuse values of fields that are not in this range; None is a field that is not given.

        Raises:
            FieldError: naming the first such field.
        """
        for name, value in values.items():
            if value is not None and value not in self:
                raise self.refusal(name, value)

    def check_flags(self, args: object, *names: str) -> None:
        """Refuse attributes of parsed arguments that are not in this range; None is not given.

        Raises:
            FieldError: naming the flag of the first such attribute.
        """
        self.check(**{as_flag(name): getattr(args, name) for name in names})

    def refusal(self, name: str, value: object) -> FieldError:
        """The refusal of a value that is not in this range."""
        kind = "an integer" if self.is_integer else "a number"
        if not _is_number(value) or (self.is_integer and not isinstance(value, int)):
            return FieldError(name, f"is not {kind}", str(self), value=value)
        return out_of_range(name, value, str(self))


ONE_OR_MORE = Range(least=1, is_integer=True)
ZERO_OR_MORE = Range(least=0)
INDEX = Range(least=0, is_integer=True)
ABOVE_ZERO = Range(least=0, excludes_least=True)
ZERO_TO_ONE = Range(least=0, most=1)
BELOW_ONE = Range(least=0, most=1, excludes_most=True)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(end: float, meaning: str) -> str:
    name = _NAMES.get(int(end), str(end)) if math.isfinite(end) else str(end)
    return f"{name} ({meaning})" if meaning else name
