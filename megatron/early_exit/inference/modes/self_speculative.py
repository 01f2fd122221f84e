"""Self-speculative decoding: drafts of the model itself, verified by all its layers in one pass.

What comes out is what the full model gives: greedily the same tokens, sampled the same
distribution (rejection sampling of Leviathan et al., arXiv 2211.17192). An exit drafts with the
model's own first layers as in LayerSkip (arXiv 2404.16710); the verification is then the catch-up
of the drafted positions through the deeper segments, so nothing is computed twice. Or Megatron's
multi-token-prediction module drafts, for which no layer of the backbone runs.
"""

from collections import abc
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.modes.draft_choice import DraftChoice, Drafter
from megatron.early_exit.inference.modes.draft_gain import (
    NO_WAITS,
    SAME_READINGS,
    DraftCosts,
)
from megatron.early_exit.inference.modes.draw import Draft, Draw
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import (
    FINAL,
    MTP,
    DecodingMode,
    ModeContext,
    Next,
    Outcome,
    SampledToken,
)
from megatron.early_exit.inference.modes.rule import DraftRule, ExitRule
from megatron.early_exit.inference.params import DraftMethod
from megatron.early_exit.inference.results import DraftCounts

_ROWS_OF_SAMPLED = 16.0
"""For sampled texts, as many rows take as long to compute as weights do to read, see `DraftCosts`:
about so on a CPU, where a further row costs most."""


@dataclass(slots=True, kw_only=True)
class SelfSpeculativeMode(DecodingMode):
    """Drafts at an exit, or with the multi-token-prediction module, and verifies when there are
    enough drafts or the drafter grows unsure. Its rule has the exit that drafts.

    Attributes:
        drafting: when the drafter goes on.
        room: the most tokens that the sequence may get in all.
        choice: of the drafter, from the accounts of all.
        adapts: these accounts also say how sure a drafter has to be, and when drafts pause since
            they do not pay; else `drafting` alone does.
        depths: of the module, the most tokens that it may draft; 0 if it does not draft.
        counts: how it has gone so far.
        details: what the drafter and the final head say in the place of each token is put on
            record.
    """

    verifies: ClassVar[bool] = True
    drafting: DraftRule
    room: int
    choice: DraftChoice
    adapts: bool = False
    depths: int = 0
    counts: DraftCounts = field(default_factory=DraftCounts)
    _likelihood: float = 1.0
    """That all drafts are accepted, by the drafter's confidences."""
    _confidences: list[float] = field(default_factory=list)
    """What the drafter said of each draft that is not verified yet."""
    _num_asked: int = 0
    _pause: int = 0
    """Tokens until there are drafts again."""
    _aim: int = 0
    _drafts: list[Draft] = field(default_factory=list)

    @classmethod
    def of(cls, context: ModeContext) -> Self:
        params = context.params
        drafters = {
            exit_index: Drafter(
                _fixed(context.draft_costs[exit_index], context), params.num_draft_tokens
            )
            for exit_index in _exits_of(context)
        }
        depths = 0
        if _method(context) != "exit" and context.mtp_costs is not None:
            depths = min(context.num_depths, params.num_draft_tokens)
            drafters[MTP] = Drafter(_fixed(context.mtp_costs, context), depths)
        least = params.draft_confidence
        adapts = least is None
        choice = DraftChoice(drafters, may_pause=adapts)
        return cls(
            context.sampler,
            ExitRule(),
            params.exit_details,
            drafting=DraftRule(params.num_draft_tokens, 0.0 if least is None else least),
            room=context.room,
            choice=choice,
            adapts=adapts,
            depths=depths,
        )

    def __post_init__(self) -> None:
        self._aim = self.drafting.max_drafts
        self._expect()
        self._ask()

    @property
    def exits(self) -> frozenset[int]:
        return frozenset(head for head in self.choice.heads if head != MTP)

    @property
    def _drafter(self) -> int:
        """The exit that drafts, or MTP."""
        return self.choice.current

    @property
    def num_depths(self) -> int:
        # Where there is room for one token only, nothing is drafted.
        return self.depths if self.room > 1 else 0

    @property
    def num_ahead(self) -> int:
        if self._drafter != MTP or not self._is_asking:
            return 0
        # For the record alone, about one token at most.
        return min(self._room_for_drafts, 1) if self._pause else self._room_for_drafts

    @property
    def _is_asking(self) -> bool:
        """Whether the drafter is asked: it is while drafts do not pause, and else for the record.
        What is recorded changes no draft, since drafts may change a sampled text."""
        return self._pause == 0 or self.details

    def start(self, num_pending: int) -> None:
        # What the exit has said in the places of the drafts is on record until they are verified.
        pass

    def asks(self, exit_index: int) -> bool:
        # Behind the last draft that there may be, what the exit says is of use for the record only.
        return DecodingMode.asks(self, exit_index) and (self._has_room or self.details)

    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        self._record(output, exit_index)
        if not self._has_room:
            return Next.DEEPER
        self._num_asked += 1
        if not self._drafts_at(output):
            return Next.DEEPER
        drafts = self.sampler.sequence.drafts
        wanted = self.sampler.draw(drafts, keeps=True)
        if exit_index == MTP and not self.sampler.has_token(output, wanted):
            # It may answer with other tokens than the request allows.
            return Next.DEEPER
        self._likelihood = self._likelihood_with(output)
        self._confidences.append(output.confidence)
        output = self.sampler.drawn(output, wanted)
        drafts.append(output.token)
        probabilities = None if output.drawn is None else output.drawn.probabilities
        self._drafts.append(Draft(output.token, probabilities))
        self._expect()
        return Next.DRAFTED

    def waste(self, num_outputs: int) -> None:
        self._num_asked += num_outputs

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
        return self._pause == 0 and self._room_for_drafts > 0

    @property
    def _room_for_drafts(self) -> int:
        """How many more may be made where drafts do not pause; none, where a further one would
        hardly be sure enough."""
        sequence, likelihood = self.sampler.sequence, self._likelihood * self._usual_confidence
        if sequence.drafts and not self.drafting.takes(likelihood):
            return 0
        most = min(self._aim, self.choice.most, self.room - len(sequence.generated) - 1)
        return max(most - len(sequence.drafts), 0)

    def _drafts_at(self, output: HeadOutput) -> bool:
        """Whether the drafter is sure enough."""
        return self.drafting.takes(self._likelihood_with(output)) and output.is_finite

    def _likelihood_with(self, output: HeadOutput) -> float:
        """That one more draft and those in front of it are accepted."""
        return self._likelihood * min(self._trust * output.confidence, 1.0)

    @property
    def _trust(self) -> float:
        return self.choice.gain.trust if self.adapts else 1.0

    @property
    def _usual_confidence(self) -> float:
        """How sure of a further draft the drafter is taken to be before it is asked."""
        if self.adapts and self._drafter == MTP:
            # The module's time is lost if it is asked in vain.
            return self.choice.gain.rate
        # That of the layers in front of an exit is not, through which the position of the draft
        # before passes anyway: so it may be quite sure.
        return min(self._trust, 1.0)

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
        if self._drafter == MTP:
            self.counts.mtp_drafted += len(drafts)
            self.counts.mtp_accepted += num_accepted
        self._judge(num_accepted)
        self._num_asked, self._confidences = 0, []
        if self.details:
            # The module has been asked about as many tokens as it could draft, an exit about each.
            missing = len(tokens) - len(reports)
            tokens = [
                replace(token, heads=(*report, self.sampler.report(output, FINAL)))
                for token, report, output in zip(
                    tokens, [*((one,) for one in reports), *[()] * missing], outputs, strict=False
                )
            ]
        return tuple(tokens)

    def _judge(self, num_accepted: int) -> None:
        """Go on with drafts, or without, and with this drafter or another, by what they gain."""
        if self._pause == 0:
            pause = self.choice.add(self._num_asked, self._confidences, num_accepted, self._company)
            self._pause = pause if self.adapts else 0
        else:
            self._pause -= 1
            self.counts.undrafted += 1
        self._expect()
        self._ask()

    def _expect(self) -> None:
        """Say how sure the drafter has to be of the next draft."""
        if self.adapts:
            num_drafts = len(self.sampler.sequence.drafts)
            least = self.choice.gain.least_likelihood(self._company, num_drafts)
            self.drafting = replace(self.drafting, least_confidence=least)

    @property
    def _company(self) -> int:
        """Sequences that count as running together. Which drafts there are may change a sampled
        text: then they must not depend on others."""
        sequence = self.sampler.sequence
        return sequence.company if self.sampler.is_always_greedy else 1

    def _ask(self) -> None:
        """Have the exit asked that drafts, if one does."""
        sequence, drafter = self.sampler.sequence, self._drafter
        sequence.is_asking = self._is_asking and drafter != MTP
        if drafter != MTP:
            # Whether to go on drafting is not for the rule: it takes whatever the exit says.
            self.rule = ExitRule((drafter,), (0.0,))
            sequence.asks_only = drafter

    def _verify(
        self, drafts: abc.Sequence[Draft], outputs: abc.Sequence[HeadOutput]
    ) -> list[SampledToken]:
        """The drafts up to the first that is refused, and one token of the final head."""
        tokens: list[SampledToken] = []
        accepted: list[int] = []
        for draft, output in zip(drafts, outputs, strict=False):
            output = self.sampler.drawn(output, self.sampler.draw(accepted, draft=draft))
            is_accepted = output.token == draft.token
            head = self._drafter if is_accepted else FINAL
            tokens.append(self.sampler.take(output, head, output.token))
            if not is_accepted:
                break
            accepted.append(draft.token)
        else:
            # The last pass has given a token behind the drafts, too.
            tokens.append(self.sampler.sample(outputs[len(drafts)], FINAL, accepted))
        self._aim = self.drafting.next_aim(len(accepted) + 1)
        return tokens


def _exits_of(context: ModeContext) -> tuple[int, ...]:
    """The exits that may draft; none where the module alone does.

    Raises:
        FieldError: the model does not have it, or the request says that the module drafts.
    """
    params, known = context.params, context.exit_layers
    method, layer = _method(context), params.draft_exit_layer
    if layer is not None:
        return (context.exit_index("draft_exit_layer", layer),)
    if method == "mtp":
        return ()
    if method == "auto" and (known or _has_mtp(context)):
        # The layer of an exit would have to see all positions although another one drafts.
        return tuple(range(len(known)))[: 1 if context.has_blocks else None]
    if not known and params.draft_method == "exit":
        allowed = "None or mtp or auto" if _has_mtp(context) else "another mode"
        raise FieldError("draft_method", "needs exits, which there are not", allowed, value="exit")
    return (context.exit_index("draft_exit_layer", known[0] if known else 0),)


def _method(context: ModeContext) -> DraftMethod:
    """What may draft.

    Raises:
        FieldError: the request says that the module does, and there is none.
    """
    params, method = context.params, context.params.draft_method
    if method == "mtp" and not _has_mtp(context):
        problem = "needs a multi-token-prediction module, which there is not"
        allowed = "exit or auto; mtp with a model that has one"
        raise FieldError("draft_method", problem, allowed, value=method)
    if method is not None:
        return method
    return "auto" if params.draft_exit_layer is None and _has_mtp(context) else "exit"


def _has_mtp(context: ModeContext) -> bool:
    return context.mtp_costs is not None


def _fixed(costs: DraftCosts, context: ModeContext) -> DraftCosts:
    """Costs to decide by: which drafts there are may change a sampled text, which neither a device
    shall nor how the model is divided."""
    if context.sampler.is_always_greedy:
        return costs
    return replace(costs, rows=_ROWS_OF_SAMPLED, waits=NO_WAITS, readings=SAME_READINGS)
