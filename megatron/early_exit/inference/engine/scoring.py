"""What a model thinks of given text: probabilities of tokens that are already there."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.head_output import HeadOutput, head_outputs
from megatron.early_exit.inference.modes.measures import Judging, needs_streams
from megatron.early_exit.inference.modes.mode import FINAL
from megatron.early_exit.inference.modes.rule import NO_EXITS, ExitRule
from megatron.early_exit.inference.results import PromptToken
from megatron.early_exit.inference.transfer import upload

CHUNK = 256
"""Positions at a time: logits of a whole context would fill the memory, and nobody shall wait for
it."""


@dataclass(frozen=True, slots=True)
class ScoringRule:
    """Which head scores a position, and what is said of it.

    Attributes:
        exit_rule: the first exit that it takes scores the position, else the final head.
        num_best: most probable tokens to give in each place.
        propagates: a position that an exit scores is held behind it, see `Sequence`.
    """

    exit_rule: ExitRule = NO_EXITS
    num_best: int = 0
    propagates: bool = False


@dataclass(frozen=True, slots=True)
class PrefixScore:
    """What a head says behind a prefix of a text."""

    position: int
    """The position of the prefix's last token."""
    head: int
    """Index of the exit, or -1 for the final head."""
    confidence: float
    best_token: int
    is_finite: bool
    """Whether the logits are numbers to judge by."""
    logprob: float | None
    """Logarithm of the probability of the token that follows; None behind the whole text."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a text that are scored in one go.

    Attributes:
        start: position of the first one.
        tokens: themselves.
        next_token: the one behind them; None at the end of the text.
    """

    start: int
    tokens: tuple[int, ...]
    next_token: int | None

    @property
    def end(self) -> int:
        """The position behind the last one."""
        return self.start + len(self.tokens)


class TextScores:
    """The scores of a text, which come piece by piece.

    Args:
        tokens: the text.
        rule: how it is scored.
        layers: the exits' numbers of backbone layers, then the model's.

    Attributes:
        scores: one for each prefix, the shortest first, as far as they have come.
        num_given: tokens of the pieces that have been given out.
        is_finite: whether the logits were numbers to judge by, so far.
    """

    def __init__(self, tokens: Sequence[int], rule: ScoringRule, layers: Sequence[int]) -> None:
        self.tokens, self.rule, self.layers = tokens, rule, layers
        self.scores: list[PrefixScore] = []
        self.num_given = 0
        self.is_finite = True

    @property
    def is_given(self) -> bool:
        """Whether there is no further piece."""
        return self.num_given == len(self.tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every prefix has its score."""
        return len(self.scores) == len(self.tokens)

    def next_piece(self) -> Piece:
        """Give out what is to be scored next."""
        start, end = self.num_given, min(self.num_given + CHUNK, len(self.tokens))
        self.num_given = end
        following = self.tokens[end] if end < len(self.tokens) else None
        return Piece(start, tuple(self.tokens[start:end]), following)

    def add(self, scores: Iterable[PrefixScore]) -> None:
        """Take the scores of the next piece, in any order."""
        self.scores += sorted(scores, key=lambda score: score.position)
        self.is_finite = all(score.is_finite for score in self.scores)

    def prompt_tokens(self) -> list[PromptToken] | None:
        """The score of every token, from those of the prefixes; None where they cannot be used, or
        some have not come."""
        if not (self.is_complete and self.is_finite):
            return None
        scored = [PromptToken(self.tokens[0], None)]
        for token, score in zip(self.tokens[1:], self.scores, strict=False):
            layer = self.layers[score.head]
            top = score.top_logprobs
            scored.append(PromptToken(token, score.logprob, top, layer, score.confidence))
        return scored


class TextScorer:
    """Runs one text through a model, or a stage of it, with caches of its own.

    Args:
        model: the model or the stage.
        length: tokens of the text.
        rule: how to score it.
        first_exit: exits on the stages before.
        is_last: no stage comes behind.
    """

    def __init__(
        self,
        model: SegmentedModel,
        length: int,
        rule: ScoringRule,
        first_exit: int = 0,
        is_last: bool = True,
    ) -> None:
        self._runner = SegmentRunner(model, num_slots=1, capacity=length)
        self._rule, self._first_exit, self._is_last = rule, first_exit, is_last
        self._asked = [i for i in range(len(model.exits)) if first_exit + i in rule.exit_rule.exits]
        self._compares = needs_streams(rule.exit_rule.measure)
        self._num_segments = len(model.segments)
        if is_last and self._asked and rule.exit_rule.takes_everything:
            self._num_segments = self._asked[0] + 1

    @torch.inference_mode()
    def run(self, piece: Piece, received: Tensor | None = None) -> tuple[list[PrefixScore], Tensor]:
        """Score the next piece.

        Args:
            piece: begins where the last one has ended.
            received: what the stage before has returned for it; None at the first one.

        Returns:
            Scores, in any order, of those prefixes that end in the piece and have theirs from a
            head here; and what the next stage needs, [`num_received`, h]: the hidden states [n, h];
            behind them those at the exit before, where confidence depends on them; and which
            positions are held, where some may be.
        """
        runner, span = self._runner, Span(0, piece.start, piece.end)
        scores: dict[int, PrefixScore] = {}
        hidden, before, held = self._split(received, piece)
        if self._compares and hidden is None:
            before = runner.model.embedding.of_spans(piece.tokens, [span])
        for index in range(self._num_segments):
            hidden = runner.run(index, [span], piece.tokens, hidden, held=held)
            if index in self._asked:
                rows, answers = self._rows(index, hidden, piece, scores)
                head = runner.model.exits[index].head
                # A block has to see every position.
                if rows or head.block is not None:
                    features = runner.exit_features(index, span)
                    outputs = partial(self._outputs, head, head.project, features, hidden, before)
                    self._ask(self._first_exit + index, outputs, piece, rows, answers, scores)
                held = self._held(held, piece, scores)
            if before is not None and index < len(runner.model.exits):
                # The runner may write over what it has returned.
                before = hidden.clone()
        assert hidden is not None
        if self._is_last:
            head = runner.model.final_head
            outputs = partial(self._outputs, head, head.logits, hidden, hidden, before)
            self._ask(FINAL, outputs, piece, _unscored(piece, scores), {}, scores)
        parts = [hidden] if before is None else [hidden, before]
        if self._rule.propagates:
            parts.append(self._marks(held, hidden))
        return list(scores.values()), hidden if len(parts) == 1 else torch.cat(parts)

    def num_received(self, piece: Piece) -> int:
        """Rows that `run` needs of the stage before."""
        count = len(piece.tokens)
        marks = self._num_marks(count) if self._rule.propagates else 0
        return count * (2 if self._compares else 1) + marks

    def _num_marks(self, count: int) -> int:
        """Rows that have a number for each of some positions."""
        return -(-count // self._runner.model.architecture.hidden_size)

    def _marks(self, held: Tensor | None, hidden: Tensor) -> Tensor:
        """Which positions are held, as numbers next to each other in rows like hidden states."""
        marks = hidden.new_zeros(self._num_marks(len(hidden)), hidden.shape[1])
        if held is not None:
            marks.view(-1)[: len(held)] = held.to(marks.dtype)
        return marks

    def _split(
        self, received: Tensor | None, piece: Piece
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states, those at the exit before, and which positions are held, of what the stage
        before has returned."""
        if received is None:
            return None, None, None
        count = len(piece.tokens)
        before = received[count : 2 * count] if self._compares else None
        held = None
        if self._rule.propagates:
            held = received[-self._num_marks(count) :].flatten()[:count] != 0
        return received[:count], before, held

    def _rows(
        self, index: int, hidden: Tensor, piece: Piece, scores: Container[int]
    ) -> tuple[list[int], dict[int, float]]:
        """The rows of a piece about which an exit is asked, and what its gate says of them, where
        that has been asked before."""
        rows, rule = _unscored(piece, scores), self._rule.exit_rule
        if not (rows and rule.asks_gates):
            return rows, {}
        gates, exit_index = self._runner.model.gates, self._first_exit + index
        assert gates is not None
        found: list[float] = gates.confidences([index] * len(rows), hidden[rows]).tolist()
        answers = {
            row: answer
            for row, answer in zip(rows, found, strict=True)
            if rule.at(piece.start + row + 1).takes(exit_index, answer)
        }
        return list(answers), answers

    def _outputs(
        self,
        head: Head,
        logits: Callable[[Tensor], Tensor],
        features: Tensor,
        hidden: Tensor,
        before: Tensor | None,
        rows: list[int],
    ) -> list[HeadOutput]:
        """What a head says of some rows, and how sure it is by the rule's measure."""

        def streams(places: Sequence[int]) -> tuple[Tensor, Tensor]:
            assert before is not None
            asked = [rows[place] for place in places]
            return hidden[asked], before[asked]

        measures = [self._rule.exit_rule.measure] * len(rows)
        judging = Judging.by(measures, head.num_others, streams)
        return head_outputs(logits(features[rows]), judging=judging)

    def _held(
        self, held: Tensor | None, piece: Piece, scores: dict[int, PrefixScore]
    ) -> Tensor | None:
        """[n], the positions that are held once an exit has scored some: those that were `held`
        before, and the scored ones."""
        if not (self._rule.propagates and scores):
            return held
        scored = [position in scores for position in range(piece.start, piece.end)]
        both = upload(scored, self._runner.model.device)
        return both if held is None else both | held

    def _ask(
        self,
        head: int,
        outputs: Callable[[list[int]], list[HeadOutput]],
        piece: Piece,
        rows: list[int],
        answers: Mapping[int, float],
        scores: dict[int, PrefixScore],
    ) -> None:
        """Let a head, which gives outputs for rows of the piece, score some that those before it
        have not; `answers` are the confidences of rows whose gates have been asked."""
        if not rows:
            return
        following = (*piece.tokens[1:], piece.next_token)
        rule = self._rule.exit_rule
        for row, found in zip(rows, outputs(rows), strict=True):
            position, token = piece.start + row, following[row]
            confidence = answers.get(row, found.confidence)
            is_taken = head == FINAL or rule.at(position + 1).takes(head, confidence)
            if is_taken or not found.is_finite:
                scores[position] = PrefixScore(
                    position,
                    head,
                    confidence,
                    found.best_token,
                    found.is_finite,
                    None if token is None else found.logprob(token),
                    found.top_logprobs(self._rule.num_best) if self._rule.num_best else (),
                )


def _unscored(piece: Piece, scores: Container[int]) -> list[int]:
    """The rows of a piece that have no score yet."""
    return [row for row in range(len(piece.tokens)) if piece.start + row not in scores]
