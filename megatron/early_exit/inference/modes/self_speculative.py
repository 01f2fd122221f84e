"""Self-speculative decoding: drafts of an exit, verified by the layers behind it in one pass.

What comes out is what the full model gives: greedily the same tokens, sampled the same
distribution (rejection sampling of Leviathan et al., arXiv 2211.17192; drafting with the model's
own first layers as in LayerSkip, arXiv 2404.16710). The verification is the catch-up of the drafted
positions through the deeper segments, so nothing is computed twice.
"""

from collections import abc
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from megatron.early_exit.inference.modes.draft_gain import DraftGain
from megatron.early_exit.inference.modes.draw import Draft, Draw
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import (
    FINAL,
    DecodingMode,
    ModeContext,
    Next,
    Outcome,
    SampledToken,
)
from megatron.early_exit.inference.modes.rule import DraftRule, ExitRule
from megatron.early_exit.inference.results import DraftCounts

_ROWS_OF_SAMPLED = 16.0
"""For sampled texts, as many rows take as long to compute as weights do to read, see `DraftCosts`:
about so on a CPU, where a further row costs most."""


@dataclass(slots=True, kw_only=True)
class SelfSpeculativeMode(DecodingMode):
    """Drafts at the rule's only exit, and verifies when there are enough drafts or the exit grows
    unsure.

    Attributes:
        drafting: when the exit goes on drafting.
        room: the most tokens that the sequence may get in all.
        gain: finds how sure the exit has to be, and when drafts pause since they do not pay; None
            drafts by `drafting` alone.
        counts: how it has gone so far.
        details: what the exit and the final head say in the place of each token is put on record.
    """

    verifies: ClassVar[bool] = True
    drafting: DraftRule
    room: int
    gain: DraftGain | None = None
    counts: DraftCounts = field(default_factory=DraftCounts)
    _likelihood: float = 1.0
    """That all drafts are accepted, by the exit's confidences."""
    _confidences: list[float] = field(default_factory=list)
    """What the exit said of each draft that is not verified yet."""
    _num_asked: int = 0
    _pause: int = 0
    """Tokens until the exit drafts again."""
    _aim: int = 0
    _drafts: list[Draft] = field(default_factory=list)

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        params, known = context.params, context.exit_layers
        layer = params.draft_exit_layer
        if layer is None:
            layer = known[0] if known else 0
        # Whether to go on drafting is not for the rule: it takes whatever the exit says.
        exit_index = context.exit_index("draft_exit_layer", layer)
        rule = ExitRule((exit_index,), (0.0,))
        gain = None
        least = params.draft_confidence
        if least is None:
            costs = context.draft_costs[exit_index]
            if not context.sampler.is_always_greedy:
                # Which drafts there are may change a sampled text, which no device shall.
                costs = replace(costs, rows=_ROWS_OF_SAMPLED)
            gain = DraftGain(costs)
            least = gain.least_likelihood()
        drafting = DraftRule(params.num_draft_tokens, least)
        return cls(
            context.sampler,
            rule,
            params.exit_details,
            drafting=drafting,
            room=context.room,
            gain=gain,
        )

    def __post_init__(self) -> None:
        self._aim = self.drafting.max_drafts

    def start(self, num_pending: int) -> None:
        # What the exit has said in the places of the drafts is on record until they are verified.
        pass

    def asks(self, exit_index: int) -> bool:
        # Behind the last draft that there may be, what the exit says is of use for the record only.
        return DecodingMode.asks(self, exit_index) and (self._has_room or self.details)

    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        self._record(output, exit_index)
        self._num_asked += 1
        if not (self._has_room and self._drafts_at(output)):
            return Next.DEEPER
        self._likelihood = self._likelihood_with(output)
        self._confidences.append(output.confidence)
        drafts = self.sampler.sequence.drafts
        output = self.sampler.drawn(output, self.sampler.draw(drafts, keeps=True))
        drafts.append(output.token)
        probabilities = None if output.drawn is None else output.drawn.probabilities
        self._drafts.append(Draft(output.token, probabilities))
        return Next.DRAFTED

    def draws(
        self, head: int, outputs: abc.Sequence[HeadOutput] | None = None
    ) -> abc.Sequence[Draw | None]:
        drafts = self.sampler.sequence.drafts
        if head == FINAL:
            # Once the outputs are known, drawing waits for nothing any more: then no token is drawn
            # in vain, behind a draft that is refused.
            return self._verifications() if outputs is None or not drafts else ()
        if not self._has_room or (outputs is not None and not self._drafts_at(outputs[0])):
            return ()
        return (self.sampler.draw(drafts, keeps=True),)

    def _verifications(self) -> list[Draw | None]:
        """What is drawn in the places of the drafts and behind them. Each has the random numbers
        that are next if all in front of it are accepted, else it does not count."""
        draws: list[Draw | None] = []
        drafts = self.sampler.sequence.drafts
        for place, draft in enumerate((*self._drafts, None)):
            later = sum(one is not None for one in draws)
            draws.append(self.sampler.draw(drafts[:place], later, draft))
        return draws

    @property
    def _has_room(self) -> bool:
        """Whether one more draft may be made."""
        sequence = self.sampler.sequence
        return len(sequence.drafts) < min(self._aim, self.room - len(sequence.generated) - 1)

    def _drafts_at(self, output: HeadOutput) -> bool:
        """Whether the exit is sure enough to draft."""
        return self.drafting.takes(self._likelihood_with(output)) and output.is_finite

    def _likelihood_with(self, output: HeadOutput) -> float:
        """That one more draft and those in front of it are accepted."""
        trust = 1.0 if self.gain is None else self.gain.trust
        return self._likelihood * min(trust * output.confidence, 1.0)

    def at_end(self, outputs: abc.Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        drafts, self.sampler.sequence.drafts = self.sampler.sequence.drafts, []
        self._likelihood = 1.0
        drafted, self._drafts = self._drafts, []
        reports, self._heads = self._heads, []
        tokens = self._verify(drafted, outputs)
        # Behind the accepted drafts there is one token of the final head.
        num_accepted = len(tokens) - 1
        self.counts.verifications += 1
        self.counts.drafted += len(drafts)
        self.counts.accepted += num_accepted
        if self.gain is not None:
            self._judge(self.gain, num_accepted)
        self._num_asked, self._confidences = 0, []
        if self.details:
            tokens = [
                replace(token, heads=(report, self.sampler.report(output, FINAL)))
                for token, report, output in zip(tokens, reports, outputs, strict=False)
            ]
        return tuple(tokens)

    def _judge(self, gain: DraftGain, num_accepted: int) -> None:
        """Go on with drafts, or without, by what they have gained."""
        sequence = self.sampler.sequence
        # Which drafts there are may change a sampled text: then they must not depend on others.
        company = sequence.company if self.sampler.is_always_greedy else 1
        if sequence.is_asking:
            self._pause = gain.add(self._num_asked, self._confidences, num_accepted, company)
            least = gain.least_likelihood(company)
            self.drafting = replace(self.drafting, least_confidence=least)
        else:
            self._pause -= 1
            self.counts.undrafted += 1
        # Whoever wants to know what the exit says gets to know it.
        sequence.is_asking = self._pause == 0 or self.details

    def _verify(
        self, drafts: abc.Sequence[Draft], outputs: abc.Sequence[HeadOutput]
    ) -> list[SampledToken]:
        """The drafts up to the first that is refused, and one token of the final head."""
        (exit_index,) = self.rule.exits
        tokens: list[SampledToken] = []
        accepted: list[int] = []
        for draft, output in zip(drafts, outputs, strict=False):
            output = self.sampler.drawn(output, self.sampler.draw(accepted, draft=draft))
            is_accepted = output.token == draft.token
            head = exit_index if is_accepted else FINAL
            tokens.append(self.sampler.take(output, head, output.token))
            if not is_accepted:
                break
            accepted.append(draft.token)
        else:
            # The last pass has given a token behind the drafts, too.
            tokens.append(self.sampler.sample(outputs[len(drafts)], FINAL, accepted))
        self._aim = self.drafting.next_aim(len(accepted) + 1)
        return tokens
