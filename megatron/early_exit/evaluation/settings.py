"""What an evaluation measures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import FieldError
from megatron.early_exit.evaluation.rule import Rule
from megatron.early_exit.ranges import INDEX, ONE_OR_MORE, ZERO_TO_ONE, Range

DEFAULT_THRESHOLDS = tuple(round(1 - number / 20, 2) for number in range(21))


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured of a model.

    Attributes:
        tasks: names of tasks, or paths of files of prompts.
        items: most prompts of each task.
        prompt_characters: most characters of a prompt that is made or cut from a text.
        thresholds: from 0 to 1.
        measures: of confidence; the first one's curves come first.
        kv_policies: what later tokens see of positions that have left.
        exit_layers: sets of exits that are used, each in ascending order; None is all that the
            model has.
        max_tokens: tokens of every answer, which go on behind an end of the text, so that all
            answers are equally long; what is behind it counts for the speed alone.
        repeats: pairs of answers, of the full model and of a rule, whose median times count.
        batch_size: prompts that are also answered together; None measures single ones alone.
        seed: of the choice of prompts and of resampling.

    Raises:
        FieldError: a value is out of range, or given twice.
    """

    tasks: tuple[str, ...]
    items: int = 8
    prompt_characters: int = 400
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    measures: tuple[ExitMeasure, ...]
    kv_policies: tuple[KVPolicy, ...] = get_args(KVPolicy)
    exit_layers: tuple[tuple[int, ...] | None, ...] = (None,)
    max_tokens: int = 128
    repeats: int = 3
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(
            items=self.items, prompt_characters=self.prompt_characters, repeats=self.repeats
        )
        # The first token alone would be the prompt's time.
        Range(least=2, is_integer=True).check(
            max_tokens=self.max_tokens, batch_size=self.batch_size
        )
        INDEX.check(seed=self.seed)
        for name in ("tasks", "thresholds", "measures", "kv_policies", "exit_layers"):
            values: tuple[Any, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise FieldError(name, "are none, or one is given twice", "each once", value=values)
        for threshold in self.thresholds:
            ZERO_TO_ONE.check(thresholds=threshold)

        for exits in self.exit_layers:
            if exits is not None and (not exits or list(exits) != sorted(set(exits))):
                raise FieldError("exit_layers", "has one twice", "each exit once", value=exits)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings as `dataclasses.asdict` and JSON have kept them.

        Raises:
            ValueError: a field is unknown or missing, or a value is out of range.
        """
        try:
            return cls(**{name: _as_tuple(value) for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"the settings are of another version: {error}") from error

    def rules(self) -> list[Rule]:
        """All rules that are measured, beside the full model."""
        return [
            Rule(threshold, kv_policy, measure, exits)
            for measure in self.measures
            for kv_policy in self.kv_policies
            for exits in self.exit_layers
            for threshold in self.thresholds
        ]


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
