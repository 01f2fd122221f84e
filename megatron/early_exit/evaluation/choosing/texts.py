"""The texts of a calibration, and what each of them is for."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.errors import FieldError
from megatron.early_exit.evaluation.items import Item


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts by what they are for.

    Attributes:
        proving: on which rules are tested.
        timed: prompts of some of them, which are continued to find out how fast proven rules are.
        fitting: prompts of other texts, which are continued to find thresholds of single exits, and
            prove nothing.
    """

    proving: Sequence[Item]
    timed: Sequence[Item]
    fitting: Sequence[Item]

    @classmethod
    def of(cls, items: Sequence[Item], num_timed: int, num_fitting: int) -> "Texts":
        """Divide texts that are all different.

        Raises:
            FieldError: a task would have no text left that proves.
        """
        fitting = _spread(items, num_fitting)
        proving = [one for one in items if one not in fitting]
        left = {one.task for one in proving}
        for one in items:
            if one.task not in left:
                problem = f"leaves no text of task {one.task} that proves"
                allowed = f"fewer, or more texts than {len(items)}"
                raise FieldError("fitting_texts", problem, allowed, value=num_fitting)
        return cls(proving, _prompts(_spread(proving, num_timed)), _prompts(fitting))

    @property
    def everything(self) -> list[Item]:
        """All of them, in the order of the indices below; those that prove come first."""
        return [*self.proving, *self.timed, *self.fitting]

    @property
    def timed_indices(self) -> range:
        """The places of `timed`."""
        return range(len(self.proving), len(self.proving) + len(self.timed))

    @property
    def fitting_indices(self) -> range:
        """The places of `fitting`."""
        return range(self.timed_indices.stop, self.timed_indices.stop + len(self.fitting))


def distinct(items: Sequence[Item]) -> list[Item]:
    """Items whose prompts are all different: the same one twice would count for two texts."""
    found: dict[tuple[str, str], Item] = {}
    for one in items:
        found.setdefault((one.task, one.prompt), one)
    return list(found.values())


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """Some of the texts, from all over the list."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _prompts(items: Sequence[Item]) -> list[Item]:
    """The prompts of texts, to be continued."""
    return [Item(one.task, one.prompt) for one in items]
