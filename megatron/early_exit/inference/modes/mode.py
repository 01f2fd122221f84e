"""Decoding modes: how the next tokens of one sequence come about.

A mode is a strategy behind one interface. It is told what the heads say about the last positions of
its sequence, and whether its rule lets a token leave there, and answers with what has to happen
next. It knows one sequence and nothing of batches, caches or layouts.
"""

from abc import ABC, abstractmethod
from collections import abc
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import ClassVar, Self

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.modes.batch_sampler import draw
from megatron.early_exit.inference.modes.draft_gain import DraftCosts
from megatron.early_exit.inference.modes.draw import Draft, Draw, Drawn
from megatron.early_exit.inference.modes.exit_gain import ExitCosts
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.measures import DEFAULT_MEASURE, GATE, MEASURES
from megatron.early_exit.inference.modes.rule import NO_EXITS, ExitRule
from megatron.early_exit.inference.modes.sampling import Sampler
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import DraftCounts, HeadReport
from megatron.early_exit.inference.sequence import Sequence

NO_TOKEN = "the head gives no token that the request allows"
FINAL = -1
"""Stands for the final head where exits are numbered."""
MTP = -2
"""Stands there for the multi-token-prediction module."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token and where it comes from."""

    token_id: int
    logprob: float
    confidence: float
    exit_layer: int
    top_logprobs: tuple[tuple[int, float], ...] = ()
    heads: tuple[HeadReport, ...] = ()


class Next(Enum):
    """What a sequence needs before it gets tokens."""

    DEEPER = auto()
    """Its last positions go through the next segment."""
    DRAFTED = auto()
    """A new draft goes through the first segment."""


Outcome = Next | tuple[SampledToken, ...]
"""What comes of a head's output: what has to run next, or the tokens that the sequence gets."""


@dataclass(slots=True)
class TokenSampler:
    """Samples tokens as a request asks for it.

    Attributes:
        params: the request.
        logits_sampler: what the request asks of the choice of tokens, and its random numbers.
        sequence: gets the tokens.
        layers: the exits' numbers of backbone layers, then the model's.
    """

    params: SamplingParams
    logits_sampler: Sampler
    sequence: Sequence
    layers: tuple[int, ...]

    @property
    def is_always_greedy(self) -> bool:
        """Whether each token is that of the largest logit."""
        return self.logits_sampler.is_always_greedy

    def sample(self, output: HeadOutput, head: int, behind: abc.Sequence[int] = ()) -> SampledToken:
        """The token that a head gives behind those generated and `behind`."""
        output = self.drawn(output, self.draw(behind))
        return self.take(output, head, output.token)

    def layer(self, head: int) -> int:
        """Backbone layers that run for what a head says; none for the multi-token-prediction
        module."""
        return 0 if head == MTP else self.layers[head]

    def draw(
        self,
        behind: abc.Sequence[int] = (),
        later: int = 0,
        draft: Draft | None = None,
        keeps: bool = False,
    ) -> Draw | None:
        """The draw of the token behind those generated and `behind`; None where it is that of the
        largest logit.

        Args:
            behind: drafts in front of it.
            later: random numbers that are taken before its own.
            draft, keeps: see `Draw`.
        """
        sampler, generated = self.logits_sampler, self.sequence.generated
        if sampler.is_greedy(len(generated) + len(behind)):
            return None
        return Draw(sampler, generated, tuple(behind), sampler.num_taken + later, draft, keeps)

    def drawn(self, output: HeadOutput, wanted: Draw | None) -> HeadOutput:
        """The output with the token of a draw, for which random numbers are taken.

        Where the token has not been drawn yet, together with other sequences', it is now.

        Raises:
            FloatingPointError: the head gives no token that the request allows.
        """
        if wanted is None:
            return output if output.drawn is None else replace(output, drawn=None)
        found = _drawn(output, wanted)
        if found.token == len(output.logits):
            raise FloatingPointError(NO_TOKEN)
        self.logits_sampler.take_numbers(found.count)
        return replace(output, drawn=found)

    def has_token(self, output: HeadOutput, wanted: Draw | None) -> bool:
        """Whether a head gives a token that the request allows, in answer to a draw."""
        return wanted is None or _drawn(output, wanted).token < len(output.logits)

    def take(self, output: HeadOutput, head: int, token: int) -> SampledToken:
        """A given token with what a head says about it."""
        count = self.params.logprobs
        top = output.top_logprobs(count) if count else ()
        return SampledToken(token, output.logprob(token), output.confidence, self.layer(head), top)

    def report(self, output: HeadOutput, head: int) -> HeadReport:
        """What a head says, for the record."""
        return HeadReport(self.layer(head), output.best_token, output.confidence)


def _drawn(output: HeadOutput, wanted: Draw) -> Drawn:
    """The token of a draw, which may have been drawn together with other sequences'."""
    found = output.drawn
    if found is None or found.draw != wanted:
        (found,) = draw([output.logits], [wanted])
    return found


@dataclass(frozen=True, slots=True)
class ModeContext:
    """What a mode is made from, beside what the request asks for.

    Attributes:
        sampler: makes tokens of what heads say; its `params` are the request.
        exit_layers: the model's exits, each named by the number of backbone layers before it.
        max_pending: see `EarlyExitMode`.
        room: the most tokens that the sequence may get in all.
        draft_costs: what drafting takes with each exit.
        exit_costs: what tokens take that may leave at exits.
        mtp_costs: what it takes with the multi-token-prediction module; None without one.
        num_depths: of that module: the most tokens that it drafts.
        stored_measure: what confidence is where the request does not say it.
        has_gates: the exits have gates.
        has_blocks: the exits have layers of their own.
    """

    sampler: TokenSampler
    exit_layers: tuple[int, ...]
    max_pending: int
    room: int
    draft_costs: tuple[DraftCosts, ...]
    exit_costs: ExitCosts
    mtp_costs: DraftCosts | None = None
    num_depths: int = 0
    stored_measure: str = DEFAULT_MEASURE
    has_gates: bool = False
    has_blocks: bool = False

    @property
    def params(self) -> SamplingParams:
        """What the request asks for."""
        return self.sampler.params

    @property
    def exits(self) -> tuple[int, ...]:
        """The indices of the exits that the request enables, ascending.

        Raises:
            FieldError: the model does not have one.
        """
        wanted = self.params.exit_layers
        layers = self.exit_layers if wanted is None else wanted
        return tuple(sorted({self.exit_index("exit_layers", layer) for layer in layers}))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each of `exits`.

        Raises:
            FieldError: the request has another number of them.
        """
        given, count = self.params.exit_thresholds, len(self.exits)
        if given is None:
            return (self.params.threshold,) * count
        if len(given) != count:
            layers = " ".join(str(self.exit_layers[one]) for one in self.exits) or "none"
            allowed = f"{count}, one for each exit that is used ({layers})"
            problem = f"has {len(given)} numbers"
            raise FieldError("exit_thresholds", problem, allowed, value=given)
        return given

    @property
    def measure(self) -> str:
        """What confidence is.

        Raises:
            FieldError: it is that of gates, and the exits have none.
        """
        measure = self.params.exit_measure or self.stored_measure
        if measure == GATE and not self.has_gates:
            others = " or ".join((DEFAULT_MEASURE, *MEASURES))
            problem = "needs exits with gates, which the model does not have"
            raise FieldError("exit_measure", problem, others, value=measure)
        return measure

    def exit_index(self, field: str, layer: int) -> int:
        """The index of an exit that a field of the request names.

        Raises:
            FieldError: the model does not have it.
        """
        if layer not in self.exit_layers:
            known = ", ".join(map(str, self.exit_layers)) or "none, the model has no exits"
            raise FieldError(field, "is unknown", known, value=layer)
        return self.exit_layers.index(layer)


@dataclass(slots=True)
class DecodingMode(ABC):
    """How one sequence gets its tokens.

    Attributes:
        verifies: what an exit says is a draft, which the final head verifies. So an exit has to be
            asked before its positions go deeper, and the final head in every case.
        sampler: makes tokens of what heads say.
        rule: the exits that are asked, and when one of them gives the token.
        details: every head that is asked is put on record.
        counts: how drafting has gone; None where there is none.
        num_unasked: tokens that no exit could give, since exits had made decoding slower.
    """

    verifies: ClassVar[bool] = False
    sampler: TokenSampler
    rule: ExitRule
    details: bool = False
    counts: DraftCounts | None = None
    num_unasked: int = 0
    _heads: list[HeadReport] = field(default_factory=list)

    @classmethod
    @abstractmethod
    def of(cls, context: ModeContext) -> Self:
        """The mode that a request asks for.

        Raises:
            FieldError: the model does not have an exit that the request names.
        """

    @property
    def exits(self) -> frozenset[int]:
        """All exits that it may ever ask about a token that it generates."""
        return frozenset(self.rule.exits)

    @property
    def scoring_rule(self) -> ExitRule:
        """The rule by which texts are scored: by default the final head scores them."""
        return NO_EXITS

    def start(self, num_pending: int) -> None:
        """The last token goes into the first segment while `num_pending` positions wait behind."""
        self._heads = []

    @property
    def num_depths(self) -> int:
        """Depths of the multi-token-prediction module that may draft."""
        return 0

    @property
    def num_ahead(self) -> int:
        """The most tokens that those depths are yet to draft behind the tokens and drafts so
        far."""
        return 0

    def asks(self, exit_index: int) -> bool:
        """Whether the exit is to be computed for the last position."""
        return exit_index in self.rule.exits and self.sampler.sequence.is_asking

    def draws(
        self, head: int, outputs: abc.Sequence[HeadOutput] | None = None
    ) -> abc.Sequence[Draw | None]:
        """The tokens to draw where a head is asked, together with those of other sequences.

        What is drawn counts only if the mode takes it; what is not drawn here, it draws when it
        needs it.

        Args:
            head: of an exit, MTP or FINAL.
            outputs: what it says; None where that is not known yet: then all that it may have to
                give.

        Returns:
            One for each position that the head is asked about; None, or no more, where there is
            nothing to draw.
        """
        return (self.sampler.draw(),) if head == FINAL else ()

    @abstractmethod
    def at_exit(self, exit_index: int, output: HeadOutput, is_taken: bool) -> Outcome:
        """The exit has been asked about the last position.

        Args:
            exit_index: of the exit, or MTP: then the module has been asked about the last draft.
            output: what it says.
            is_taken: the rule lets the position leave there.
        """

    def waste(self, num_outputs: int) -> None:
        """The multi-token-prediction module has been asked so often, besides, in vain."""
        return

    @abstractmethod
    def at_end(self, outputs: abc.Sequence[HeadOutput]) -> tuple[SampledToken, ...]:
        """The last segment has been run.

        Args:
            outputs: of the final head, for the sequence's last token and each draft.

        Returns:
            The tokens that the sequence gets.
        """

    def _record(self, output: HeadOutput, head: int) -> None:
        if self.details:
            self._heads.append(self.sampler.report(output, head))
