"""What quality is wished for, and what each text loses of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.early_exit.errors import FieldError, as_flag
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.records import Record, begun_records
from megatron.early_exit.evaluation.text_scores import CHOICE_SCORES, SCORES
from megatron.early_exit.ranges import Range

AGREEMENT = "agreement"
ALL_SCORES = (*SCORES, *CHOICE_SCORES)
_BINARY = ("exact_match", *CHOICE_SCORES)
"""Scores of which a text can have all or nothing."""
_DIGITS = 12
"""Digits behind the point that are kept where 1 is taken less a share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a rule must keep, on each task.

    Attributes:
        agreement: the expected share of an answer's tokens that the full model would choose after
            the same text; None where it does not matter.
        task_loss: how much of a score may be expected to be lost, in points of 100, against the
            full model's answer to the same prompt, where a text that is better makes up for none
            that is worse; None where it does not matter.
        score: name of the score; None is `accuracy` of choices, and `f1` of answers.
        confidence: probability with which a rule is found that keeps it.

    Raises:
        FieldError: a value is out of range, nothing is wished for, or a score has no effect.
    """

    agreement: float | None = None
    task_loss: float | None = None
    score: str | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        share = Range(least=0, most=1, excludes_least=True, excludes_most=True)
        share.check(agreement=self.agreement, confidence=self.confidence)
        points = Range(least=0, most=100, excludes_least=True, excludes_most=True)
        points.check(task_loss=self.task_loss)
        if self.agreement is None and self.task_loss is None:
            raise FieldError("agreement", "is not given, and --task-loss neither", "one or both")
        if self.score is not None and self.task_loss is None:
            problem = "has no effect without --task-loss"
            raise FieldError("score", problem, "with --task-loss", value=self.score)

    def check_records(self, path: Path) -> None:
        """Refuse this wish if it may have been made after it was seen what texts have lost.

        Args:
            path: of records whose header has the `wish` that they were measured for; it may be
                missing.

        Raises:
            ValueError: they were measured for another wish, or are damaged.
        """
        header, _ = begun_records(path)
        before = None if header is None else header.get("wish")
        if header is None or before == asdict(self):
            return
        given = {name: value for name, value in (before or {}).items() if value is not None}
        flags = " ".join(f"{as_flag(name)} {value}" for name, value in given.items())
        raise ValueError(
            f"{path} is of texts that were measured for {flags or 'something else'}: a promise "
            "that is chosen after it was seen what they lose is not proven by them, allowed: the "
            "same promise, or another folder with new texts"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A loss that has to be small on one task.

    Attributes:
        task: name of the task.
        name: `agreement`, or the name of a score.
        limit: what a text may be expected to lose, above 0 and below 1.
        indices: of the task's prompts.
    """

    task: str
    name: str
    limit: float
    indices: tuple[int, ...]

    @property
    def is_binary(self) -> bool:
        """Whether each text can only lose all or nothing."""
        return self.name in _BINARY

    def loss(self, item: Item, record: Record, full: Record | None) -> float:
        """What a text has lost, from 0 to 1.

        Args:
            item: the prompt. What an answer has behind its stop texts does not count.
            record: of the rule.
            full: the full model's; None for agreement.
        """
        if full is None:
            counted = record["counted"]
            if item.stop:
                counted = item.length(record["token_texts"][:counted])
            agrees = record["agrees"][:counted]
            return agrees.count(False) / len(agrees)
        return max(self._score(full) - self._score(record), 0.0)

    def _score(self, record: Record) -> float:
        # An exit that cannot answer with a choice has not chosen.
        scores = record if self.name in CHOICE_SCORES else record["scores"]
        return float(scores[self.name] or 0.0)


def requirements_of(wish: Wish, items: Sequence[Item]) -> tuple[Requirement, ...]:
    """What is to be proven of a rule.

    Args:
        wish: for each task.
        items: the prompts of all tasks.

    Raises:
        ValueError: a task's prompts have no such quality.
    """
    tasks: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        tasks.setdefault(item.task, []).append(index)
    found = []
    for task, indices in tasks.items():
        own = [items[i] for i in indices]
        if wish.agreement is not None:
            if any(one.choices for one in own):
                raise ValueError(
                    f"--agreement {wish.agreement}: task {task} has choices, behind which nothing "
                    "is written, allowed: --task-loss for it"
                )
            limit = round(1 - wish.agreement, _DIGITS)
            found.append(
                Requirement(task=task, name=AGREEMENT, limit=limit, indices=tuple(indices))
            )
        if wish.task_loss is not None:
            name = _score_of(wish, task, own)
            limit = round(wish.task_loss / 100, _DIGITS)
            found.append(Requirement(task=task, name=name, limit=limit, indices=tuple(indices)))
    return tuple(found)


def _score_of(wish: Wish, task: str, items: Sequence[Item]) -> str:
    has_choices = [bool(one.choices) for one in items]
    is_answered = [one.reference is not None for one in items]
    possible: Mapping[bool, Sequence[str]] = {
        True: CHOICE_SCORES if all(has_choices) else (),
        False: tuple(SCORES) if all(is_answered) else (),
    }
    allowed = possible[all(has_choices)]
    name = wish.score or ("accuracy" if all(has_choices) else "f1")
    if name not in allowed:
        names = ", ".join(allowed) or "tasks whose prompts all have references, or all have choices"
        raise ValueError(f"--score {name}: task {task} has none, allowed: {names}")
    return name
