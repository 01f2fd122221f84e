"""Options that are read from flags, and the refusal of flags that do not go together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Self

from megatron.early_exit.errors import as_flag

API_KEY_VARIABLE = "EARLY_EXIT_API_KEY"
"""Environment variable in the place of `--api-key`, of the server and of its client."""


@dataclass(frozen=True, kw_only=True)
class FlagFields:
    """Options whose fields are named like flags and keep their defaults where none is given."""

    @classmethod
    def from_attributes(cls, source: object) -> Self:
        """Read the fields from the attributes of parsed arguments; absent ones keep defaults."""
        names = (f.name for f in fields(cls))
        return cls(**{n: getattr(source, n) for n in names if getattr(source, n, None) is not None})

    def refuse_changed(self, *names: str, without: str) -> None:
        """Refuse fields that differ from their defaults although they have no effect.

        Args:
            names: the fields.
            without: the flag without which they have no effect.

        Raises:
            ValueError: naming the flag of the first such field.
        """
        for one in fields(self):
            if one.name in names and getattr(self, one.name) != one.default:
                raise ValueError(f"{as_flag(one.name)} has no effect without {without}")


def refuse_beside(flag: str, args: object, others: Mapping[str, tuple[object, str]]) -> None:
    """Refuse arguments that cannot be combined with a flag.

    Args:
        flag: the flag, which is given.
        args: parsed arguments.
        others: for each argument, the one value that is allowed with the flag, and the reason.

    Raises:
        ValueError: naming the flag of the first such argument, its value and the reason.
    """
    for name, (served, reason) in others.items():
        value = getattr(args, name, served)
        if value != served:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{as_flag(name)}{shown} cannot be combined with {flag}: {reason}")


def refuse_given(
    args: object,
    names: Iterable[str],
    reason: str,
    default_of: Callable[[str], object] = lambda name: None,
) -> None:
    """Refuse arguments that are given although they have no effect.

    Args:
        args: parsed arguments.
        names: of the arguments.
        reason: ends the sentence.
        default_of: the value of an argument that is not given, as `ArgumentParser.get_default` has
            it.

    Raises:
        ValueError: naming the flag of the first such argument and its value.
    """
    for name in names:
        value = getattr(args, name)
        if value != default_of(name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            flag = " ".join([as_flag(name), *map(str, values)])
            raise ValueError(f"{flag} has no effect {reason}")
