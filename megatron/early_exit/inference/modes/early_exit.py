"""The first exit that is confident enough, else the final head."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from megatron.early_exit.inference.modes.draw import Draw
from megatron.early_exit.inference.modes.exit_gain import ExitGain
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
    arXiv 2310.05424). A request may have them made of the hidden state at the exit instead, and
    have the exits left out for some time where they make decoding slower.

    Attributes:
        max_pending: when this many positions wait, the next token takes them through all segments
            whatever its exit says; that bounds the time of the longest step. None is no limit.
        asking: the rule while exits are asked.
        gain: tells when they are not; None asks them always.
        details: every exit on the way is put on record, also behind the one that gave the token.
    """

    max_pending: int | None
    asking: ExitRule = field(init=False)
    gain: ExitGain | None = None
    _left: SampledToken | None = None
    _left_at: int = FINAL
    _pause: int = 0
    """Tokens until exits are asked again."""
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
        is_held = params.kv_policy == "propagate"
        # What is only handed up takes hardly any time, whenever that is.
        max_pending = None if is_held else context.max_pending
        gain = None
        if params.exits_pay_at:
            gain = ExitGain(
                context.exit_costs,
                rule.exits,
                params.exits_pay_at,
                is_gated=rule.asks_gates,
                is_held=is_held,
            )
        return cls(context.sampler, rule, params.exit_details, max_pending=max_pending, gain=gain)

    def __post_init__(self) -> None:
        self.asking = self.rule

    @property
    def scoring_rule(self) -> ExitRule:
        return self.asking.over(len(self.sampler.sequence.prompt))

    def start(self, num_pending: int) -> None:
        DecodingMode.start(self, num_pending)
        rule = self.asking.at(len(self.sampler.sequence.generated))
        # Whoever wants to know what exits say gets to know it, but no token from them.
        self.rule = replace(rule, thresholds=()) if self._pause else rule
        self._left = None
        self._goes_through = self.max_pending is not None and num_pending >= self.max_pending

    def asks(self, exit_index: int) -> bool:
        return DecodingMode.asks(self, exit_index) and (self._left is None or self.details)

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
            self._left, self._left_at = self.sampler.sample(output, exit_index), exit_index
            if not self._goes_through:
                return self._finish(self._left, exit_index)
        return Next.DEEPER

    def at_end(self, outputs: Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        self._record(outputs[-1], FINAL)
        if self._left is not None:
            return self._finish(self._left, self._left_at)
        return self._finish(self.sampler.sample(outputs[-1], FINAL), FINAL)

    def _finish(self, token: SampledToken, head: int) -> tuple[SampledToken, ...]:
        if self.gain is not None:
            self._judge(self.gain, head)
        return (replace(token, heads=tuple(self._heads)),)

    def _judge(self, gain: ExitGain, head: int) -> None:
        """Go on with exits, or without, by what they have gained: wherever the engine has run the
        position, its token is taken to have stopped behind the head that gave it."""
        if self._pause:
            self._pause -= 1
            self.num_unasked += 1
        else:
            last = len(self.sampler.layers) - 1
            self._pause = gain.add(last if head == FINAL else head)
        self.sampler.sequence.is_asking = self._pause == 0 or self.details
