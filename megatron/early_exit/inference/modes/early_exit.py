"""The first exit that is confident enough, else the final head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron.early_exit.inference.modes.draw import Draw
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


@dataclass(slots=True, kw_only=True)
class EarlyExitMode(DecodingMode):
    """The rule's first confident exit gives the token.

    Segments behind the exit are not run. When a later token goes deeper, the positions that wait in
    front of a segment go through it together with that token, so every key and value is what the
    full model computes, and none is computed twice (hidden states kept at the exit as in FREE,
    arXiv 2310.05424). A request may have them made of the hidden state at the exit instead.

    Attributes:
        max_pending: when this many positions wait, the next token takes them through all segments
            whatever its exit says; that bounds the time of the longest step. None is no limit.
        details: every exit on the way is put on record, also behind the one that gave the token.
    """

    max_pending: int | None
    _left: SampledToken | None = None
    _goes_through: bool = False

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        params = context.params
        rule = ExitRule(
            context.exits,
            context.thresholds,
            context.measure,
            params.exit_threshold_decay,
            params.max_tokens,
        )
        # What is only handed up takes hardly any time, whenever that is.
        max_pending = None if params.kv_policy == "propagate" else context.max_pending
        return cls(context.sampler, rule, params.exit_details, max_pending=max_pending)

    @property
    def scoring_rule(self) -> ExitRule:
        return self.rule.over(len(self.sampler.sequence.prompt))

    def start(self, num_pending: int) -> None:
        DecodingMode.start(self, num_pending)
        self.rule = self.rule.at(len(self.sampler.sequence.generated))
        self._left = None
        self._goes_through = self.max_pending is not None and num_pending >= self.max_pending

    def asks(self, exit_index: int) -> bool:
        return exit_index in self.rule.exits and (self._left is None or self.details)

    def draws(
        self, head: int, outputs: Sequence[HeadOutput] | None = None
    ) -> Sequence[Draw | None]:
        if self._left is not None:
            return ()
        if head != FINAL and outputs is not None:
            (output,) = outputs
            if not self.rule.takes(head, output.confidence):
                return ()
        return (self.sampler.draw(),)

    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        self._record(output, exit_index)
        if self._left is None and is_taken:
            self._left = self.sampler.sample(output, exit_index)
            if not self._goes_through:
                return self._finish(self._left)
        return Next.DEEPER

    def at_end(self, outputs: Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        self._record(outputs[-1], FINAL)
        return self._finish(self._left or self.sampler.sample(outputs[-1], FINAL))

    def _finish(self, token: SampledToken) -> tuple[SampledToken, ...]:
        return (replace(token, heads=tuple(self._heads)),)
