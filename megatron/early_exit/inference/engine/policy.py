"""How far to run a batch before its heads are asked. Holds numbers, no tensors.

With few rows, reading weights takes the time: a segment takes it once for all that run in it, and
so does the vocabulary's matrix for all heads that share it. So it may pay to run on before an exit
is asked, and to ask it together with the heads behind; what it says counts all the same. Whether it
pays depends on how often the exit is taken, and on who else waits deeper in the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.modes.draft_gain import (
    NO_WAITS,
    SAME_READINGS,
    DraftCosts,
    Readings,
    Waits,
)
from megatron.early_exit.inference.modes.exit_gain import ExitCosts

ROWS = {"cpu": 16.0, "cuda": 200.0}
"""Rows that take as long to compute as weights take to read, roughly, by the kind of device."""

_HEAD = 0.65
"""A weight of a head next to one of a layer, which has more to do than large products."""
UNLIKELY = 0.1
"""A head that a sequence gets to no more often is asked only when that is certain."""
_OFTEN = 0.7
"""Where exits give tokens so often, more of what runs on would be in vain than is gained by it, in
simulations with measured times."""
_FEW = 8
"""So few sequences are too few to leave some of them behind for a batch of their own later, where
gates are asked on the way: by the measured times of a CPU no schedule is better by more than 1 %
than to take all of them to the end, and by more than 7 % where reading weights takes nearly all of
the time (`tests/unit/benchmarks/test_best_schedule.py`)."""
_SLACK = 0.02
"""Where it makes so little difference, heads are asked early: what is expected is not certain. But
not where exits hardly ever give a token: that much is certain, and each question is a step more."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What takes time, in weights that are read.

    Attributes:
        segments: weights of each.
        head: weights of the projection to the vocabulary.
        exit_head: weights of an exit's projection.
        shares_heads: all heads have the same projection.
        held: the share of a layer that a position takes that is held behind an exit, for its keys
            and values.
        rows: as many rows take as long to compute as the weights do to read.
        step: what each step takes besides, as a share of the segments.
        readings: how long the weights of layers take to read, for several rows. Those of heads take
            as long for a few rows as for one.
    """

    segments: tuple[float, ...]
    head: float = 0.0
    exit_head: float = 0.0
    shares_heads: bool = True
    held: float = 0.0
    rows: float = ROWS["cpu"]
    step: float = 0.02
    readings: Readings = SAME_READINGS

    @classmethod
    def of(
        cls,
        shape: Architecture,
        exits: Sequence[int],
        exit_vocab_size: int,
        shares_heads: bool,
        device: str,
    ) -> "Costs":
        """The costs of a model on a kind of device.

        Args:
            exits: the layers that its exits follow.
            exit_vocab_size: tokens that they answer with.
        """
        layer = float(shape.layer_weights)
        segments = tuple(layer * (b - a) for a, b in pairwise((0, *exits, shape.num_layers)))
        head, exit_head = (
            _HEAD * shape.hidden_size * size for size in (shape.vocab_size, exit_vocab_size)
        )
        keys_and_values = 2 * shape.num_query_groups * shape.kv_channels * shape.hidden_size
        rows = ROWS.get(device, ROWS["cuda"])
        return cls(segments, head, exit_head, shares_heads, keys_and_values / layer, rows)

    def of_drafts(self, exit_index: int, block: float = 0.0, waits: Waits = NO_WAITS) -> DraftCosts:
        """What drafting with an exit takes.

        Args:
            block: weights of the exit's own layer, where it has one.
            waits: for messages between stages.
        """
        front, step = sum(self.segments[: exit_index + 1]), self.step * sum(self.segments)
        return DraftCosts(
            ask=front + block + self.exit_head,
            verify=sum(self.segments) - front + self.head,
            full=sum(self.segments) + self.head,
            rows=self.rows,
            step=step,
            front=front,
            waits=waits,
            readings=self._readings,
        )

    def of_exits(self, block: float = 0.0) -> ExitCosts:
        """What tokens take that may leave at exits.

        Args:
            block: weights of an exit's own layer, where it has one.
        """
        return ExitCosts(
            self.segments,
            self.head,
            self.exit_head + block,
            self.held,
            self.rows,
            self.step * sum(self.segments),
        )

    def of_mtp_drafts(
        self,
        shape: Architecture,
        draft_vocab_size: int,
        waits: Waits = NO_WAITS,
        passes: float | None = None,
    ) -> DraftCosts:
        """What drafting with the multi-token-prediction module of a model takes.

        Args:
            draft_vocab_size: tokens that it drafts.
            waits: for messages between stages.
            passes: the time of asking it about a row, over that of a row through all layers; None
                is what its weights take.
        """
        depth = float(shape.layer_weights + 2 * shape.hidden_size**2)
        layers, a_row = sum(self.segments), 1 + 1 / self.rows
        full, step = layers + self.head, self.step * layers
        ask = depth + _HEAD * shape.hidden_size * draft_vocab_size
        if passes is not None:
            besides = passes * (layers * a_row + step) - (ask * a_row + step)
            waits = waits._replace(ask=waits.ask + max(besides, 0.0))
        return DraftCosts(
            ask=ask,
            verify=full,
            full=full,
            rows=self.rows,
            step=step,
            waits=waits,
            readings=self._readings,
            missed=depth,
        )

    @property
    def _readings(self) -> Readings:
        """How long the weights of the full model take to read, for several rows."""
        layers = sum(self.segments)
        share = layers / (layers + self.head)
        return Readings(*(1 + (one - 1) * share for one in self.readings))


ROWS_OF_READINGS = (1, 2, 4)
"""Rows of the passes that `readings_of` takes the times of."""


def readings_of(seconds: Sequence[float], rows: float) -> Readings:
    """How long weights take to read for several rows, by the times of passes of ROWS_OF_READINGS.

    Args:
        seconds: of each pass.
        rows: as many take as long to compute as weights do to read.
    """
    alone, *others = seconds
    # A pass takes the time of reading and, for each row, a share of that for a single row.
    readings = (
        time / alone * (1 + 1 / rows) - count / rows
        for time, count in zip(others, ROWS_OF_READINGS[1:], strict=True)
    )
    return Readings(*(max(one, 1.0) for one in readings))


class SegmentQueue:
    """What to expect of the sequences in front of one segment.

    Args:
        index: of the segment.
        exit_rates: of each sequence, see `Sequence`.
        propagates: for each of them, whether positions that leave are held; None is nobody's.
        gated: of each, whether the gates of exits are asked first, see `Sequence`.

    Attributes:
        count: how many there are.
        rows: by segment, how many run there before heads in front of it are asked; of held ones
            behind gates that often let them leave, how many are expected.
        taken: by segment, how many get their token if the heads up to the one behind it are asked.
        held: by segment, how many of those leave nothing but keys and values undone.
        asked: by segment, how many heads are evaluated for that, without unlikely ones; behind
            gates, which cost nothing that counts, those that give the token.
        all_gated: all of the sequences ask gates.
        all_held: positions of all of them that leave are held.
    """

    __slots__ = ("all_gated", "all_held", "asked", "count", "held", "rows", "taken")

    def __init__(
        self,
        index: int,
        num_segments: int,
        exit_rates: Sequence[Sequence[float]],
        propagates: Sequence[bool] | None = None,
        gated: Sequence[bool] | None = None,
    ) -> None:
        self.count = len(exit_rates)
        propagates = propagates or [False] * self.count
        gated = gated or [False] * self.count
        self.all_gated, self.all_held = all(gated), all(propagates)
        self.rows, self.asked = [0.0] * num_segments, [0.0] * num_segments
        self.taken, self.held = [0.0] * num_segments, [0.0] * num_segments
        for own, is_held, is_gated in zip(exit_rates, propagates, gated, strict=True):
            stays, number, runs = 1.0, 0.0, 1.0
            for segment in range(index, num_segments):
                if runs:
                    self.rows[segment] += runs
                    if own[segment]:
                        number += stays * own[segment] if is_gated else stays > UNLIKELY
                        stays *= 1 - own[segment]
                    if is_held and is_gated and is_asked_on_the_way(own[segment]):
                        runs *= 1 - own[segment]
                    elif is_held and not is_gated and is_worth_waiting(own[segment]):
                        runs = 0.0
                self.taken[segment] += 1 - stays
                self.asked[segment] += number
                if is_held:
                    self.held[segment] += 1 - stays


def is_worth_waiting(exit_rate: float) -> bool:
    """Whether an exit gives tokens so often that a position that would be held there goes no deeper
    before it has been asked, also where others do: what they do is the arithmetic that they save.
    """
    return exit_rate >= _OFTEN


def is_asked_on_the_way(exit_rate: float) -> bool:
    """Whether the gate of an exit gives tokens so often that positions that would be held there go
    no deeper in the same step before it has been asked. Else it is asked with all others, behind
    the last segment of the step."""
    return exit_rate > UNLIKELY


class Policy:
    """Finds the segments that promise the most tokens for their time if they are run now.

    Greedy, and close to the best schedule that there is for the same costs (`benchmarks/`). Running
    some segments is judged alone, and together with taking those that get no token there to the
    end. Positions that leave are charged with what they leave undone: later tokens attend to them.
    Of held ones that is keys and values, so a position that is likely to leave does not run on.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._last = len(costs.segments) - 1
        self._step = costs.step * sum(costs.segments)
        self._behind = [sum(costs.segments[index + 1 :]) for index in range(len(costs.segments))]

    def choose(self, queues: Sequence[SegmentQueue], through: int | None = None) -> range:
        """Segments to run one after another, with all that wait in front of each, before the heads
        behind them are asked.

        Args:
            queues: in front of each segment; somewhere there is somebody.
            through: a segment that has to be among them.
        """
        if self._runs_to_the_end(queues):
            first = next(index for index, queue in enumerate(queues) if queue.count)
            return range(first, self._last + 1)
        best, most, slack = range(0), 0.0, 0.0
        for start, queue in enumerate(queues):
            if not queue.count or (through is not None and start > through):
                continue
            for end in range(start if through is None else through, self._last + 1):
                promise, share = self._promise(queues, start, end)
                if promise > most * (1 + slack):
                    best, most = range(start, end + 1), promise
                    slack = _SLACK * min(share / UNLIKELY, 1.0)
        return best

    def _runs_to_the_end(self, queues: Sequence[SegmentQueue]) -> bool:
        """Whether a step takes all sequences to the end, but for those whose gates let them leave
        on the way."""
        if sum(queue.count for queue in queues) > _FEW:
            return False
        return all(queue.all_gated and queue.all_held for queue in queues)

    def _promise(self, queues: Sequence[SegmentQueue], start: int, end: int) -> tuple[float, float]:
        """Tokens over costs of the segments from `start` to `end`, and the share of the sequences
        there that get one."""
        count, taken, held, asked, later, costs = 0.0, 0.0, 0.0, 0.0, 0.0, self._step
        for index in range(start, end + 1):
            queue = queues[index]
            count += queue.count
            rows = sum(one.rows[index] for one in queues[start : index + 1])
            # Less than one row is how likely anybody gets there.
            reading = min(rows, 1.0)
            costs += self._costs.segments[index] * (reading + rows / self._costs.rows)
            taken += queue.taken[end]
            held += queue.held[end]
            asked += queue.asked[end]
            later += queue.asked[-1] - queue.asked[end]
        gated = all(queue.all_gated for queue in queues)
        costs += self._heads(asked, start, end, gated)
        undone = taken - held * (1 - self._costs.held)
        costs += undone * self._behind[end] / self._costs.rows
        alone, share = taken / costs, taken / count
        if end == self._last:
            return alone, share
        stays = 1 - share
        # Behind gates, what is evaluated later is what is expected already.
        later = later if gated else later * stays
        count, asked, costs = count * stays, later, costs + self._step
        for index in range(end + 1, self._last + 1):
            queue = queues[index]
            count += queue.count
            costs += self._product(index, count)
            asked += queue.asked[-1]
        costs += self._heads(asked, end + 1, self._last, gated)
        return max(alone, (taken + count) / costs), share

    def _product(self, segment: int, rows: float) -> float:
        return self._costs.segments[segment] * (1 + rows / self._costs.rows)

    def _heads(self, asked: float, start: int, end: int, gated: bool) -> float:
        """What the heads behind the segments from `start` to `end` cost."""
        if not asked:
            return 0.0
        costs, exits = self._costs, end - start + 1
        # Behind gates, the weights of a head are read only if one lets a sequence leave.
        is_read = min(asked, 1.0) if gated else 1.0
        if costs.shares_heads:
            return costs.head * (is_read + asked / costs.rows)
        final = costs.head if end == self._last else 0.0
        exits -= end == self._last
        return final + costs.exit_head * (exits * is_read + asked / costs.rows)
