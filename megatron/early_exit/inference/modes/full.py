"""All layers, for every token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import (
    FINAL,
    DecodingMode,
    ModeContext,
    Next,
    Outcome,
    SampledToken,
)
from megatron.early_exit.inference.modes.rule import ExitRule


@dataclass(slots=True)
class FullMode(DecodingMode):
    """The final head gives every token. Exits of the rule are put on record on the way, no more."""

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        reported = context.exits if context.params.exit_details else ()
        return cls(context.sampler, ExitRule(reported), details=bool(reported))

    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        self._record(output, exit_index)
        return Next.DEEPER

    def at_end(self, outputs: Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        self._record(outputs[-1], FINAL)
        token = self.sampler.sample(outputs[-1], FINAL)
        return (replace(token, heads=tuple(self._heads)),)
