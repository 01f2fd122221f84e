"""The loop over the segments of a model that this process, or its tensor-parallel group, has."""

from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.failures import is_out_of_memory, reason_of
from megatron.early_exit.inference.engine.gate_batch import GateAnswers, GateBatch
from megatron.early_exit.inference.engine.graphed_heads import GraphedHeads
from megatron.early_exit.inference.engine.head_batch import HeadBatch
from megatron.early_exit.inference.engine.head_reading import HeadOutputs
from megatron.early_exit.inference.engine.loop import DecodingLoop
from megatron.early_exit.inference.engine.mtp_drafting import MtpDrafting
from megatron.early_exit.inference.engine.policy import Costs, is_asked_on_the_way
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.scheduler import ScheduledBatch, Scheduler
from megatron.early_exit.inference.engine.scoring import TextScorer
from megatron.early_exit.inference.model.page_store import PageStore
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import NOT_FINITE, HeadOutput
from megatron.early_exit.inference.modes.mode import MTP, DecodingMode, Next
from megatron.early_exit.inference.sequence import Sequence


class _Stretch(NamedTuple):
    """A batch that has been run: what came of it [r, h], and the places of the sequences of which
    nothing waits there any more."""

    step: ScheduledBatch
    hidden: Tensor
    complete: list[int]


class _Questions(NamedTuple):
    """What is asked of the head behind a batch that has been run: what came of it [r, h], and for
    each sequence its mode and the number of positions at its end; 0 does not ask."""

    step: ScheduledBatch
    hidden: Tensor
    modes: list[DecodingMode]
    counts: list[int]

    def only(self, keys: Container[int]) -> "_Questions":
        """What is asked about the sequences with some keys."""
        pairs = zip(self.step.sequences, self.counts, strict=True)
        return self._replace(counts=[count if one.key in keys else 0 for one, count in pairs])


class SegmentLoop(DecodingLoop):
    """Runs a batch through one segment or several, and asks the heads that it has passed.

    Args:
        runner: the model and its caches.
        pages: gives memory of the caches to sequences.
        is_alone: no other process makes the same steps. Then an exception ends the requests that it
            is about, and the loop goes on; else the processes would not be at the same step any
            more, so `step` raises it. It also does where the device computes no more.
    """

    def __init__(self, runner: SegmentRunner, pages: CachePages, is_alone: bool = True) -> None:
        model = runner.model
        heads = [*(exit_.head for exit_ in model.exits), model.final_head]
        costs = Costs.of(
            model.architecture,
            [exit_.position for exit_ in model.exits],
            model.exit_vocab_size,
            len({id(head.projection) for head in heads}) == 1,
            model.device.type,
        )
        blocks = frozenset(i for i, one in enumerate(model.exits) if one.head.block is not None)
        scheduler = Scheduler(
            len(model.segments), runner.num_slots, costs=costs, pages=pages, blocks=blocks
        )
        super().__init__(scheduler, model.device)
        self.runner, self.pages = runner, pages
        self._graphed_heads = GraphedHeads.of(model)
        self._store = PageStore(runner, pages.page_size)
        self._is_alone = is_alone
        self._mtp = MtpDrafting(runner) if model.mtp else None
        self._to_draft: list[Request] = []
        """Those that have begun a token in this step, and may have drafts by the module."""
        self._scorers: dict[int, TextScorer] = {}
        self._suspects: set[int] = set()
        """Whose state is unknown if there is an exception now."""

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        sequence = self.scheduler.running.get(key)
        if sequence is not None:
            if sequence.generated and self.requests[key].error is None:
                self._store_pages(sequence)
            self.runner.release(sequence.slot)
        super().cancel(key)
        self._scorers.pop(key, None)

    def _advance(self) -> None:
        for part in (self._decode, self._score):
            try:
                part()
            except Exception as error:
                self._contain(error)

    def _decode(self) -> None:
        """Run a batch, and ask its heads."""
        self._to_draft = []
        # Before a sequence is admitted to a slot, what was in it has to be gone.
        self._let_go()
        for sequence in self.scheduler.admit():
            self._admit(sequence)
        self._suspects = set(self.scheduler.running)
        step = self.scheduler.next()
        self._suspects = set()
        if step is None:
            return
        with torch.inference_mode():
            stretches, gates = self._run(step)
            answers = GateAnswers() if gates is None else gates.answers()
            passed, likely, unlikely = self._heads(stretches, answers)
            undecided = self._decide(passed, answers, self._outputs(likely, answers))
            self._suspects = set(undecided)
            if undecided:
                # Not of those that have left: a block is not to see what is behind their exits.
                rest = [one.only(undecided) for one in unlikely]
                self._decide(undecided, answers, self._outputs(rest, answers))
            self._suspects = set()
            if self._mtp is not None:
                self._draft(self._mtp)

    def _let_go(self) -> None:
        """Give back the memory of what had to go, so that others can have it."""
        while self.scheduler.vacated:
            self.runner.release(self.scheduler.vacated.pop())
        if self.pages.dropped:
            self._store.drop(self.pages.take_dropped())

    def _admit(self, sequence: Sequence) -> None:
        self._suspects = {sequence.key}
        try:
            self.runner.truncate(sequence.slot, 0)
            for index, page in enumerate(self.pages.take_prefix(sequence.key)):
                self._store.load(page.number, sequence.slot, index)
            mode = self._mode(sequence)
            if sequence.num_admissions == 1:
                mode.start(0)
            self.scheduler.exit_rates.start(sequence, not mode.verifies)
        except Exception as error:
            self._contain(error)

    def _contain(self, error: Exception) -> None:
        """End the requests that an exception is about, with all that is kept for them.

        Raises:
            Exception: the same one, where the loop cannot go on.
        """
        failed, self._suspects = self._suspects, set()
        if not (self._is_alone and failed and self._can_go_on(error)):
            raise error
        if is_out_of_memory(error):
            self._give_up_stored_pages()
        for key in failed:
            self._fail(key, reason_of(error), error)

    def _score(self) -> None:
        """Score the next piece of the prompt that waits first."""
        key = self._next_to_score()
        if key is None:
            return
        scoring, self._suspects = self.unscored[key], {key}
        if key not in self._scorers:
            length = len(scoring.tokens)
            self._scorers[key] = TextScorer(self.runner.model, length, scoring.rule)
        scores, _ = self._scorers[key].run(scoring.next_piece())
        if scoring.is_given:
            del self._scorers[key]
        self._take_scores(self.requests[key], scores)
        self._suspects = set()

    def _run(self, step: ScheduledBatch | None) -> tuple[list[_Stretch], GateBatch | None]:
        """Run a batch as far as the scheduler wants.

        Returns:
            What has been run, and the gates that have to be asked before any head; None where the
            model has none.
        """
        stretches, own, let_out = [], self.runner.model.gates, set[int]()
        gates = None if own is None else GateBatch(own)
        while step is not None:
            self._suspects.update(sequence.key for sequence in step.sequences)
            self._let_go()
            for segment in range(step.segment, step.last + 1):
                if held := step.held(segment):
                    self.runner.propagate(segment, held)
            hidden = self.runner.run(step.segment, step.spans, _inputs(step), last=step.last)
            complete = self.scheduler.ran(step)
            stretches.append(_Stretch(step, hidden, complete))
            if self._mtp is not None and step.last == self.scheduler.num_segments - 1:
                pieces = set(range(len(step.sequences))).difference(complete)
                self._mtp.follow([step.sequences[index] for index in sorted(pieces)])
            if gates is not None:
                gated = [one for one in complete if self._asks_gate(step.sequences[one], step.last)]
                gates.add(step.last, step.spans, gated, hidden)
                let_out = self._let_out([step.sequences[one] for one in gated], step.last, gates)
            step = self.scheduler.onward(step, complete, let_out)
        return stretches, gates

    def _heads(
        self, stretches: list[_Stretch], answers: GateAnswers
    ) -> tuple[dict[int, list[int]], list[_Questions], list[_Questions]]:
        """Choose the heads to ask.

        Returns:
            The segments that sequences have passed, by key; what heads there are asked; and what
            those are which sequences hardly get to.
        """
        likely: list[_Questions] = []
        unlikely: list[_Questions] = []
        passed: dict[int, list[int]] = {}
        left: set[int] = set()
        for step, hidden, complete in stretches:
            first, later = [0] * len(step.spans), [0] * len(step.spans)
            for index in complete:
                sequence = step.sequences[index]
                own = passed.setdefault(sequence.key, [])
                if sequence.asks_gates:
                    is_likely = sequence.key not in left
                else:
                    is_likely = self.scheduler.exit_rates.is_likely(sequence, own)
                mode = self._mode(sequence)
                if not answers.refuses(step.last, sequence.slot, mode):
                    counts = first if is_likely else later
                    counts[index] = self._num_asked(sequence, step.last)
                if answers.lets_out(step.last, sequence.slot, mode):
                    left.add(sequence.key)
                own.append(step.last)
            modes = [self._mode(sequence) for sequence in step.sequences]
            likely.append(_Questions(step, hidden, modes, first))
            unlikely.append(_Questions(step, hidden, modes, later))
        return passed, likely, unlikely

    def _outputs(self, questions: list[_Questions], answers: GateAnswers) -> HeadOutputs:
        """Evaluate the heads that are asked, those that share a projection in one product."""
        heads = HeadBatch(self.runner, self._graphed_heads, answers)
        for step, hidden, modes, counts in questions:
            heads.add(step.last, step.spans, modes, counts, hidden)
        return heads.outputs()

    def _draft(self, mtp: MtpDrafting) -> None:
        """Have the multi-token-prediction module draft behind the tokens of this step, a depth at a
        time."""
        begun, asked, depth = self._to_draft, self._to_draft, 1
        while asked := [one for one in asked if one.mode.num_ahead]:
            self._suspects = {one.key for one in asked}
            outputs = mtp.ask(depth, asked)
            asked = [
                one
                for one, output in zip(asked, outputs, strict=True)
                if self._alone(one.sequence, partial(self._takes_draft, one, output))
            ]
            depth += 1
        self._suspects = set()
        for request in begun:
            if request.key in self.requests and not request.sequence.is_stored:
                self._store_pages(request.sequence)

    def _takes_draft(self, request: Request, output: HeadOutput) -> bool:
        """Whether the mode of a request takes a draft of the module, and may take another."""
        if not output.is_finite:
            self._fail(request.key, NOT_FINITE)
            return False
        return request.mode.at_exit(MTP, output, True) is Next.DRAFTED

    def _asks_gate(self, sequence: Sequence, segment: int) -> bool:
        """Whether the gate behind a segment is asked, before the exit there."""
        is_exit = segment < self.scheduler.num_segments - 1
        return sequence.asks_gates and is_exit and self._num_asked(sequence, segment) > 0

    def _let_out(self, gated: list[Sequence], segment: int, gates: GateBatch) -> set[int]:
        """The keys of those that go no deeper in this step, since their gates say that they
        leave."""
        held = [one for one in gated if one.propagates]
        if not any(is_asked_on_the_way(one.exit_rates[segment]) for one in held):
            return set()
        answers = gates.answers()
        return {one.key for one in held if answers.lets_out(segment, one.slot, self._mode(one))}

    def _num_asked(self, sequence: Sequence, segment: int) -> int:
        """Positions that the head behind a segment is asked about."""
        if segment == self.scheduler.num_segments - 1:
            return sequence.num_verified
        if segment < sequence.num_answered:
            return 0
        return int(self._mode(sequence).asks(segment))

    def _decide(
        self, passed: dict[int, list[int]], answers: GateAnswers, outputs: HeadOutputs
    ) -> dict[int, list[int]]:
        """Tell the modes what the heads say, in the order of the segments. What one decides makes
        those behind it idle, even if they have been asked. A mode does not hear of an exit whose
        gate has refused.

        Returns:
            The segments that are left over, by key, from the first one that has not been asked.
        """
        undecided = {}
        for key, segments in passed.items():
            sequence = self.scheduler.running[key]
            for place, segment in enumerate(segments):
                if not self._num_asked(sequence, segment):
                    continue
                if answers.refuses(segment, sequence.slot, self._mode(sequence)):
                    self.scheduler.exit_rates.learn(sequence, segment, False)
                    continue
                found = outputs.get((segment, sequence.slot))
                if found is None:
                    undecided[key] = segments[place:]
                    break
                if not self._goes_deeper(sequence, segment, found):
                    break
        return undecided

    def _goes_deeper(self, sequence: Sequence, segment: int, found: list[HeadOutput]) -> bool:
        """Whether a sequence goes on behind a segment, by what the head there says; else it has got
        what it needs."""
        return self._alone(sequence, partial(self._hear, sequence, segment, found))

    def _alone(self, sequence: Sequence, decide: Callable[[], bool]) -> bool:
        """Decide something about a sequence: an exception is about this one alone, which is over
        then."""
        try:
            return decide()
        except Exception as error:
            others = self._suspects
            self._suspects = {sequence.key}
            self._contain(error)
            self._suspects = others - {sequence.key}
            return False

    def _hear(self, sequence: Sequence, segment: int, found: list[HeadOutput]) -> bool:
        request = self.requests[sequence.key]
        mode = request.mode
        if not all(one.is_finite for one in found):
            self._fail(sequence.key, NOT_FINITE)
            return False
        if segment == self.scheduler.num_segments - 1:
            self._continue(request, mode.at_end(found), segment)
            return False
        output = found[0]
        outcome = mode.at_exit(segment, output, mode.rule.takes(segment, output.confidence))
        self.scheduler.exit_rates.learn(sequence, segment, outcome is not Next.DEEPER)
        self._continue(request, outcome, segment)
        return outcome is Next.DEEPER

    def _mode(self, sequence: Sequence) -> DecodingMode:
        return self.requests[sequence.key].mode

    def _begin_token(self, request: Request) -> None:
        sequence = request.sequence
        if sequence.num_depths:
            # Its pages have also what its drafts need.
            self._to_draft.append(request)
        elif not sequence.is_stored:
            # What the heads have said of it is finite, so others can have it.
            self._store_pages(sequence)
        super()._begin_token(request)

    def _store_pages(self, sequence: Sequence) -> None:
        """Keep the pages of a sequence for others that begin with the same tokens."""
        copies = self.pages.store(sequence, self._store.block_lengths(sequence.slot))
        self._store.drop(self.pages.take_dropped())
        try:
            for one in copies:
                self._store.save(one.page.number, sequence.slot, one.index, one.depth, one.blocks)
        except Exception as error:
            # The sequence itself has what it needs.
            if not (self._is_alone and is_out_of_memory(error) and self._can_go_on(error)):
                raise
            self._give_up_stored_pages()
        self.scheduler.stop_following(sequence.key)

    def _give_up_stored_pages(self) -> None:
        self.pages.clear()
        self._store.drop(self.pages.take_dropped())

    def _rewind(self, sequence: Sequence) -> None:
        self.runner.truncate(sequence.slot, sequence.length - 1)
        if sequence.depths:
            # Blocks that have seen the position before it was clear that it is held.
            self.runner.truncate(sequence.slot, sequence.length - 2, sequence.depths[-1] + 1)

    def _discard(self, sequence: Sequence) -> None:
        # Drafts may be taken back already that have been through the model.
        self.runner.clear(sequence.slot, max(sequence.length, *sequence.cached))


def _inputs(step: ScheduledBatch) -> list[int] | None:
    if step.segment > 0:
        return None
    return [
        token
        for sequence, (_, start, end) in zip(step.sequences, step.spans, strict=True)
        for token in sequence.token_ids(start, end)
    ]
