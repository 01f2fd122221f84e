"""Which flags are on the command line, and how they are written there."""

import enum
import sys
from argparse import Action, ArgumentParser, Namespace


def given_arguments(parser: ArgumentParser) -> frozenset[str]:
    """Names of the arguments that are on the command line."""
    absent = object()
    names = {action.dest for action in parser._actions}
    parsed = parser.parse_args(namespace=Namespace(**dict.fromkeys(names, absent)))
    return frozenset(name for name in names if getattr(parsed, name, absent) is not absent)


def has_default(parser: ArgumentParser, args: Namespace, name: str) -> bool:
    """Whether the argument `name` has its default value, which asks for nothing new."""
    value, default = getattr(args, name), parser.get_default(name)
    # Some of Megatron's flags take lists and have defaults that are none.
    return bool(value == default or value == [default])


def given_option(parser: ArgumentParser, name: str, value: object) -> str:
    """The flag that sets the argument `name`, as it is on the command line, and its value."""
    words = {word.split("=")[0] for word in sys.argv[1:]}
    options = _options(parser, name)
    return _written(*next((one for one in options if one[0] in words), options[0]), value)


def option_with_value(parser: ArgumentParser, name: str, value: object) -> str | None:
    """A flag and its value; None where there is no such flag, or it would not be given for that."""
    options = _options(parser, name)
    is_switch = isinstance(value, bool) and value == parser.get_default(name)
    if not options or value is None or is_switch:
        return None
    return _written(*options[0], value)


def _options(parser: ArgumentParser, name: str) -> list[tuple[str, Action]]:
    return [
        (option, action)
        for action in parser._actions
        if action.dest == name
        for option in action.option_strings
    ]


def _written(option: str, action: Action, value: object) -> str:
    if action.nargs == 0:
        return option
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([option, *(v.name if isinstance(v, enum.Enum) else str(v) for v in values)])
