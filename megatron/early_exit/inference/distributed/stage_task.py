"""What the stages of a pipeline tell each other about the positions that they compute."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import torch

from megatron.early_exit.inference.distributed.control import Message
from megatron.early_exit.inference.model.kv_cache import Span, in_pass_order
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.measures import needs_streams
from megatron.early_exit.inference.modes.mode import FINAL
from megatron.early_exit.inference.modes.rule import NO_EXITS, ExitRule


@dataclass(frozen=True, slots=True)
class HeadMessage:
    """What a head says about a position, without its logits.

    Attributes:
        head: index of the exit in the whole model, or FINAL.
        normalizer, best_token, best_logprob, confidence: see `HeadOutput`.
    """

    head: int
    normalizer: float
    best_token: int
    best_logprob: float
    confidence: float

    @classmethod
    def of(cls, head: int, output: HeadOutput) -> "HeadMessage":
        """The message about an output."""
        return cls(
            head, output.normalizer, output.best_token, output.best_logprob, output.confidence
        )

    def output(self, logits: torch.Tensor) -> HeadOutput:
        """The inverse of `of`, with logits [v] that came beside it."""
        return HeadOutput(
            logits, self.normalizer, self.best_token, self.best_logprob, self.confidence
        )


@dataclass(frozen=True, slots=True)
class StageTask:
    """Consecutive positions of one sequence on their way through the stages.

    Heads are asked about the last of them.

    Attributes:
        key: of the request that they belong to.
        slot, start, end: the positions.
        tokens: at these positions; only in front of the first stage.
        rule: the exits that are still to be asked, until it takes the output of one.
        final: the final head is to be asked.
        verify: it is to be asked also when the rule has taken an exit's output.
        logits: they are wanted with the message about a head.
        details: exits are evaluated for the record, also where their gates refuse.
        clear: the slot's cache has to be cleared first, since it may hold NaN.
        load: numbers of stored pages that go into the slot first, for the positions before `start`.
        propagates: the last position is held behind the exit that gives its token, see `Sequence`.
        held: positions that are held, each with the exit behind which that is.
        outputs: of the exits that the rule has not taken.
    """

    key: int
    slot: int
    start: int
    end: int
    tokens: tuple[int, ...] = ()
    rule: ExitRule = NO_EXITS
    final: bool = False
    verify: bool = False
    logits: bool = False
    details: bool = False
    clear: bool = False
    load: tuple[int, ...] = ()
    propagates: bool = False
    held: tuple[tuple[int, int], ...] = ()
    outputs: tuple[HeadMessage, ...] = field(default=())

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.end - self.start

    @property
    def compares(self) -> bool:
        """Whether a head is to be asked whose confidence depends on the residual stream at the exit
        before."""
        return needs_streams(self.rule.measure) and (self.final or self.next_exit is not None)

    @property
    def num_sent(self) -> int:
        """Rows of hidden states that come with it from the stage before, see `StageStreams`."""
        return self.num_rows + int(self.compares)

    @property
    def next_exit(self) -> int | None:
        """The exit that is to be asked next; None where there is none."""
        return self.rule.exits[0] if self.rule.exits else None

    def behind(self, output: HeadMessage) -> tuple["StageTask", bool]:
        """What is left to do after a head was asked, and whether the driver has to know."""
        outputs = (*self.outputs, output)
        if output.head == FINAL or not math.isfinite(output.normalizer):
            return replace(self, rule=NO_EXITS, final=False, outputs=outputs), True
        if self.rule.takes(output.head, output.confidence):
            outputs = () if self.verify else outputs
            left = replace(self, rule=NO_EXITS, final=self.verify, outputs=outputs)
            if self.propagates:
                left = replace(left, held=(*self.held, (self.end - 1, output.head)))
            return left, True
        return replace(self, rule=self.rule.behind(output.head), outputs=outputs), False

    def message(self) -> Message:
        """The task as JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Message) -> "StageTask":
        """The inverse of `message`."""
        outputs = tuple(HeadMessage(**output) for output in message["outputs"])
        rule = ExitRule.from_message(message["rule"])
        lists = {name: tuple(message[name]) for name in ("tokens", "load")}
        lists["held"] = tuple(map(tuple, message["held"]))
        return cls(**{**message, **lists, "rule": rule, "outputs": outputs})


@dataclass(slots=True)
class StageBatch:
    """The tasks of one pass: at most one span of each slot, of which several tasks may be part.

    Attributes:
        spans: by slot.
        tasks: in the order of their arrival.
    """

    spans: dict[int, Span] = field(default_factory=dict)
    tasks: list[StageTask] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Number of positions of all tasks."""
        return sum(task.num_rows for task in self.tasks)

    def fits(self, tasks: Iterable[StageTask]) -> bool:
        """Whether tasks, in the order of a pass, continue what is in the batch."""
        ends = {slot: span.end for slot, span in self.spans.items()}
        for task in tasks:
            if ends.get(task.slot, task.start) != task.start:
                return False
            if task.slot in ends and (task.clear or task.load):
                return False
            ends[task.slot] = task.end
        return True

    def add(self, tasks: Iterable[StageTask]) -> None:
        """Add tasks, which `fits` has said to continue what is there."""
        for task in tasks:
            span = self.spans.get(task.slot)
            start = task.start if span is None else span.start
            self.spans[task.slot] = Span(task.slot, start, task.end)
            self.tasks.append(task)

    def in_order(self) -> tuple[list[Span], list[int]]:
        """The spans in the order of a pass, and the tasks in that of their rows in it."""
        spans = sorted(self.spans.values(), key=in_pass_order)
        places = {span.slot: index for index, span in enumerate(spans)}
        order = sorted(
            range(len(self.tasks)), key=lambda i: (places[self.tasks[i].slot], self.tasks[i].start)
        )
        return spans, order


@dataclass(frozen=True, slots=True)
class HeldRows:
    """What a segment does with the positions of a pass where some of them are held.

    Attributes:
        held: those, which only get keys and values.
        rounds: the others, in the order of a pass; those of a slot on either side of held ones are
            in different rounds.
    """

    held: list[Span]
    rounds: list[list[Span]]

    @classmethod
    def of(cls, spans: Iterable[Span], tasks: Iterable[StageTask], segment: int) -> "HeldRows":
        """Divide spans, of which `tasks` tell which positions are held behind which exits.

        Args:
            segment: its number in the whole model.
        """
        places = {
            (task.slot, one) for task in tasks for one, behind in task.held if behind < segment
        }
        held: list[Span] = []
        rounds: list[list[Span]] = []
        for slot, start, end in spans:
            number = 0
            runs = groupby(range(start, end), key=lambda position: (slot, position) in places)
            for is_held, run in runs:
                first, *rest = run
                span = Span(slot, first, first + 1 + len(rest))
                if is_held:
                    held.append(span)
                    continue
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append(span)
                number += 1
        return cls(held, [sorted(spans, key=in_pass_order) for spans in rounds])


def rows_of(parts: Iterable[Span], spans: Iterable[Span]) -> list[int]:
    """The rows that parts of spans have in a pass over those."""
    first, row = {}, 0
    for slot, start, end in spans:
        first[slot] = row - start
        row += end - start
    return [first[slot] + position for slot, start, end in parts for position in range(start, end)]
