"""What refuses flags of Megatron that would change nothing."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from megatron.early_exit.errors import as_flag
from megatron.early_exit.training.cli.given_flags import given_option, has_default


@dataclass(frozen=True, kw_only=True)
class FlagRule:
    """Flags that are refused, by their names in Megatron's arguments.

    Attributes:
        refusal: why, in words that go on behind the flag and its value.
        met: whether with these arguments the flags do something, or ask for what is so anyway.
        names: the flags one by one.
        families: what the names of all such flags begin with.
        but: names of a family that are not refused.
    """

    refusal: str
    met: Callable[[Namespace], bool]
    names: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether the flag `name` is one of them."""
        return name in self.names or (name.startswith(self.families) and name not in self.but)


def unsupported(
    reason: str, met: Callable[[Namespace], bool] = lambda args: False, **flags: tuple[str, ...]
) -> FlagRule:
    """A rule for flags that nothing here reads; `flags` are the fields of `FlagRule` that list
    them."""
    return FlagRule(refusal=f"is not supported: {reason}", met=met, **flags)


def dependent(needs: str, met: Callable[[Namespace], bool], **flags: tuple[str, ...]) -> FlagRule:
    """A rule for flags that do nothing without something else, by what that is."""
    return FlagRule(refusal=f"has no effect without {needs}", met=met, **flags)


def dependent_on(
    *needed: str, families: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> FlagRule:
    """A rule for flags that do nothing unless one of the flags `needed` is given."""
    return FlagRule(
        refusal=f"has no effect without {' or '.join(map(as_flag, needed))}",
        met=any_given(*needed),
        names=names,
        families=families,
        but=tuple(name for name in needed if name.startswith(families)),
    )


def any_given(*names: str) -> Callable[[Namespace], bool]:
    """Any of the arguments has a value that is not None, false, zero or empty."""
    return lambda args: any(getattr(args, name) for name in names)


def is_one_of(name: str, *values: object) -> Callable[[Namespace], bool]:
    """The argument has one of these values."""
    return lambda args: getattr(args, name) in values


def check_rules(
    rules: Iterable[FlagRule], parser: ArgumentParser, args: Namespace, given: Collection[str]
) -> None:
    """Refuse flags that would change nothing.

    Args:
        rules: for which flags, and when.
        parser: of the command line.
        args: what it has parsed, with what a checkpoint has restored.
        given: names of the arguments that are on the command line; those with their default value
            are taken.

    Raises:
        ValueError: naming the flag, its value and the reason.
    """
    asked = [name for name in sorted(given) if not has_default(parser, args, name)]
    for name in asked:
        for rule in rules:
            if rule.covers(name) and not rule.met(args):
                flag = given_option(parser, name, getattr(args, name))
                raise ValueError(f"{flag} {rule.refusal}")
