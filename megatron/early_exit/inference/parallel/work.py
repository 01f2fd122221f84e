"""What the stages of a pipeline tell each other about the positions that they compute."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import torch

from megatron.early_exit.inference.compute.spans import Span, in_pass_order
from megatron.early_exit.inference.decoding.confidence import Assessment
from megatron.early_exit.inference.parallel.control import Message

FINAL = -1
"""Stands for the final head where exits are numbered."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a head has said about a position, without its logits."""

    head: int
    """Index of the exit among all of the model, or FINAL."""
    normalizer: float
    best_token: int
    best_logprob: float

    @classmethod
    def of(cls, head: int, assessment: Assessment) -> "Finding":
        """The finding in an assessment."""
        a = assessment
        return cls(head, a.normalizer, a.best_token, a.best_logprob)

    def assessment(self, logits: torch.Tensor) -> Assessment:
        """As the head made it."""
        return Assessment(logits, self.normalizer, self.best_token, self.best_logprob)


@dataclass(frozen=True, slots=True)
class Work:
    """Consecutive positions of one sequence on their way through the stages.

    Heads are asked about the last of them.

    Attributes:
        key: whose they are.
        slot, start, end: where they are.
        tokens: at these positions; only in front of the first stage.
        asks: exits to ask, by their index among all of the model, until one is confident.
        threshold: how confident it has to be.
        final: the final head is to be asked.
        verify: it is to be asked also when an exit has been confident.
        logits: they are wanted with a finding.
        clear: what the slot has cached is not to be trusted, not even as a number.
        findings: of the exits that were not confident.
    """

    key: int
    slot: int
    start: int
    end: int
    tokens: tuple[int, ...] = ()
    asks: tuple[int, ...] = ()
    threshold: float = math.inf
    final: bool = False
    verify: bool = False
    logits: bool = False
    clear: bool = False
    findings: tuple[Finding, ...] = field(default=())

    @property
    def num_rows(self) -> int:
        """Positions."""
        return self.end - self.start

    def behind(self, finding: Finding) -> tuple["Work", bool]:
        """What is left to do after a head was asked, and whether the driver has to know.

        This is the one place that knows when a position is decided.
        """
        findings = (*self.findings, finding)
        is_finite = math.isfinite(finding.normalizer)
        if finding.head == FINAL or not is_finite:
            return replace(self, asks=(), final=False, findings=findings), True
        if math.exp(finding.best_logprob) >= self.threshold:
            findings = () if self.verify else findings
            return replace(self, asks=(), final=self.verify, findings=findings), True
        return replace(self, asks=self.asks[1:], findings=findings), False

    def message(self) -> Message:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Message) -> "Work":
        """The inverse of `message`."""
        findings = tuple(Finding(**finding) for finding in message["findings"])
        lists = {name: tuple(message[name]) for name in ("tokens", "asks")}
        return cls(**{**message, **lists, "findings": findings})


@dataclass(slots=True)
class Batch:
    """Work of one pass: at most one span of each slot, of which several works may be part.

    Attributes:
        spans: by slot.
        works: in the order of their arrival.
    """

    spans: dict[int, Span] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Positions."""
        return sum(work.num_rows for work in self.works)

    def takes(self, works: Iterable[Work]) -> bool:
        """Whether works, in the order of a pass, continue what is in the batch."""
        ends = {slot: span.end for slot, span in self.spans.items()}
        for work in works:
            if ends.get(work.slot, work.start) != work.start or (work.clear and work.slot in ends):
                return False
            ends[work.slot] = work.end
        return True

    def add(self, works: Iterable[Work]) -> None:
        """Put works in."""
        for work in works:
            span = self.spans.get(work.slot)
            start = work.start if span is None else span.start
            self.spans[work.slot] = Span(work.slot, start, work.end)
            self.works.append(work)

    def in_order(self) -> tuple[list[Span], list[int]]:
        """The spans in the order of a pass, and the works in that of their rows in it."""
        spans = sorted(self.spans.values(), key=in_pass_order)
        places = {span.slot: index for index, span in enumerate(spans)}
        order = sorted(
            range(len(self.works)),
            key=lambda i: (places[self.works[i].slot], self.works[i].start),
        )
        return spans, order
