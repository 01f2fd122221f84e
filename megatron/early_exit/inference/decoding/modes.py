"""Decoding modes: how the next tokens of one sequence come about.

A mode is a strategy behind one interface. It sees what the heads say about the last positions of
its sequence and answers with what has to happen next; it holds numbers of one request and knows
nothing of batches, caches or layouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import ClassVar, Protocol

from torch import Tensor

from megatron.early_exit.inference.decoding.confidence import Assessment
from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.inference.decoding.results import DraftCounts, HeadReport
from megatron.early_exit.inference.decoding.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and where it comes from."""

    token_id: int
    logprob: float
    confidence: float
    exit_layer: int
    top_logprobs: tuple[tuple[int, float], ...] = ()
    heads: tuple[HeadReport, ...] = ()


class Next(Enum):
    """What a sequence needs next."""

    DEEPER = auto()
    """The next segment."""
    DRAFTED = auto()
    """A new draft is to go through the first segment."""
    CHOSEN = auto()
    """Nothing before the tokens in `choices` are taken over."""


@dataclass(slots=True)
class Chooser:
    """Makes choices as a request asks for them.

    Attributes:
        params: the request.
        sampler: its sampler.
        generated: the tokens that the sequence has got, without drafts.
        layers: the exits' numbers of backbone layers, then the model's.
    """

    params: SamplingParams
    sampler: Sampler
    generated: list[int]
    layers: tuple[int, ...]

    def choose(self, assessment: Assessment, head: int, drafts: Sequence[int] = ()) -> Choice:
        """The token that a head gives behind `generated` and `drafts`."""
        if self.sampler.is_greedy(len(self.generated) + len(drafts)):
            return self.take(assessment, head, assessment.best_token)
        probabilities = self.distribution(assessment, drafts)
        return self.take(assessment, head, self.sampler.draw(probabilities))

    def distribution(self, assessment: Assessment, drafts: Sequence[int] = ()) -> Tensor:
        """The probabilities [v] from which the token behind `generated` and `drafts` is drawn."""
        return self.sampler.distribution(assessment.logits, [*self.generated, *drafts])

    def take(self, assessment: Assessment, head: int, token: int) -> Choice:
        """A token given what a head says about it."""
        count = self.params.logprobs
        top = assessment.top_logprobs(count) if count else ()
        logprob = assessment.logprob(token)
        return Choice(token, logprob, assessment.confidence, self.layers[head], top)

    def report(self, assessment: Assessment, head: int) -> HeadReport:
        """What a head says, for the record."""
        return HeadReport(self.layers[head], assessment.best_token, assessment.confidence)


class DecodingMode(Protocol):
    """How one sequence gets its tokens.

    Attributes:
        drafts: tokens behind the sequence's own that may yet be taken back.
        choices: the tokens that it gets, after `Next.CHOSEN`.
        asks_late: whether it makes no difference when positions have been through further segments
            before `at_exit` is told of an exit.
    """

    drafts: list[int]
    choices: list[Choice]
    asks_late: ClassVar[bool]

    @property
    def counts(self) -> DraftCounts | None:
        """How drafting has gone; None where there is none."""
        ...

    def start(self, num_pending: int) -> None:
        """The last token goes into the first segment while `num_pending` positions wait behind."""
        ...

    def asks(self, exit_index: int) -> bool:
        """Whether the exit is to be computed for the last position."""
        ...

    def at_exit(self, exit_index: int, assessment: Assessment) -> Next:
        """The exit has been asked."""
        ...

    def at_end(self, assessments: Sequence[Assessment]) -> Next:
        """The last segment has been run; always CHOSEN.

        Args:
            assessments: of the final head for the sequence's last token and each draft that has
                been run.
        """
        ...


@dataclass(slots=True)
class FullMode:
    """All layers, for every token.

    Attributes:
        reported: exits, by their index, that are put on record on the way.
    """

    asks_late: ClassVar[bool] = True
    chooser: Chooser
    reported: frozenset[int] = frozenset()
    drafts: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    counts: None = None
    _heads: list[HeadReport] = field(default_factory=list)

    def start(self, num_pending: int) -> None:
        self._heads = []

    def asks(self, exit_index: int) -> bool:
        return exit_index in self.reported

    def at_exit(self, exit_index: int, assessment: Assessment) -> Next:
        self._heads.append(self.chooser.report(assessment, exit_index))
        return Next.DEEPER

    def at_end(self, assessments: Sequence[Assessment]) -> Next:
        choice = self.chooser.choose(assessments[-1], -1)
        if self.reported:
            self._heads.append(self.chooser.report(assessments[-1], -1))
        self.choices = [replace(choice, heads=tuple(self._heads)) if self._heads else choice]
        return Next.CHOSEN


@dataclass(slots=True)
class EarlyExitMode:
    """The first exit that is confident enough, else the final head.

    Segments behind the exit are not run. When a later token goes deeper, the positions that wait in
    front of a segment go through it together with that token, so every key and value is what the
    full model computes, and none is computed twice (hidden states kept at the exit as in FREE,
    arXiv 2310.05424).

    Attributes:
        threshold: least confidence to leave.
        exits: the exits to ask, by their index.
        max_pending: when this many positions wait, the next token takes them through all segments
            whatever its exit says; that bounds the time of the longest step.
        details: every exit on the way is put on record, also behind the one that gave the token.
    """

    asks_late: ClassVar[bool] = True
    chooser: Chooser
    threshold: float
    exits: frozenset[int]
    max_pending: int
    details: bool = False
    drafts: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    counts: None = None
    _left: Choice | None = None
    _goes_through: bool = False
    _heads: list[HeadReport] = field(default_factory=list)

    def start(self, num_pending: int) -> None:
        self._left = None
        self._goes_through = num_pending >= self.max_pending
        self._heads = []

    def asks(self, exit_index: int) -> bool:
        return exit_index in self.exits and (self._left is None or self.details)

    def at_exit(self, exit_index: int, assessment: Assessment) -> Next:
        if self.details:
            self._heads.append(self.chooser.report(assessment, exit_index))
        if self._left is None and assessment.confidence >= self.threshold:
            self._left = self.chooser.choose(assessment, exit_index)
            if not self._goes_through:
                return self._choose(self._left)
        return Next.DEEPER

    def at_end(self, assessments: Sequence[Assessment]) -> Next:
        if self.details:
            self._heads.append(self.chooser.report(assessments[-1], -1))
        return self._choose(self._left or self.chooser.choose(assessments[-1], -1))

    def _choose(self, choice: Choice) -> Next:
        self.choices = [replace(choice, heads=tuple(self._heads)) if self.details else choice]
        return Next.CHOSEN
