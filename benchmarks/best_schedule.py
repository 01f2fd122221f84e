"""The best schedule for sequences that leave at exits at random, if only matrix products took time.

A state is the number of sequences that wait in front of each segment. A step runs some consecutive
segments for all sequences that wait in front of them, and then evaluates all their heads in one
product; with gates, who leaves runs no further, and only its head is evaluated. When a position
leaves, what has to be computed of the layers that it skips is charged at once, at the rate of large
batches. Howard's policy iteration finds the steps with the most tokens per second (Puterman, Markov
Decision Processes, 11.4).
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

Seconds = Callable[[float], float]
"""Seconds that a product takes, by its number of rows."""
State = tuple[int, ...]
"""The number of sequences that wait in front of each segment."""


class Step(NamedTuple):
    """What running some segments does.

    Attributes:
        tokens: how many sequences leave, as expected.
        seconds: as expected.
        ways: the states behind it, each with its probability.
    """

    tokens: float
    seconds: float
    ways: dict[State, float]


def tokens_per_second(
    batch: int,
    chance: float,
    shares: Sequence[float],
    layers: Seconds,
    head: Seconds,
    rate: float,
    gated: bool = False,
) -> float:
    """Tokens per second of the best schedule.

    Args:
        batch: number of sequences.
        chance: probability of leaving at an exit that is evaluated.
        shares: share of each segment in the layers.
        layers: time of all layers.
        head: time of a head.
        rate: time of what has to be computed of all layers for one row of a large batch, if it has
            left.
        gated: gates, which take no time, are asked behind each segment; those that they let leave
            run no further, and only their heads are evaluated.
    """
    last = len(shares) - 1
    states = [s for s in product(range(batch + 1), repeat=last + 1) if sum(s) == batch]
    number = {state: index for index, state in enumerate(states)}
    ranges = [range(a, b + 1) for a in range(last + 1) for b in range(a, last + 1)]
    shape = (len(ranges), len(states))
    tokens, seconds = torch.full(shape, -1e9).double(), torch.ones(shape).double()
    moves = torch.zeros(*shape, len(states)).double()
    runs = Runs(chance, shares, layers, head, rate)
    run = runs.behind_gates if gated else runs.before_heads
    for (a, steps), (s, state) in product(enumerate(ranges), enumerate(states)):
        if not any(state[front] for front in steps):
            continue
        step = run(state, steps)
        tokens[a, s], seconds[a, s] = step.tokens, step.seconds
        for way, weight in step.ways.items():
            moves[a, s, number[way]] += weight
    return _best_rate(tokens, seconds, moves)


class Runs(NamedTuple):
    """What running some segments takes, see `tokens_per_second` for the fields."""

    chance: float
    shares: Sequence[float]
    layers: Seconds
    head: Seconds
    rate: float

    def before_heads(self, state: State, steps: range) -> Step:
        """All run to the end of the segments before their heads are evaluated."""
        last, end, rows, asked, got, time = len(self.shares) - 1, steps[-1], 0, 0, 0.0, 0.0
        ways = {_without(state, steps): 1.0}
        for front in steps:
            count = state[front]
            rows, asked = rows + count, asked + count * (end - front + 1)
            time += self.shares[front] * self.layers(rows)
            leave = 1.0 if end == last else 1 - (1 - self.chance) ** (end - front + 1)
            got += count * leave
            ways = _spread(ways, count, leave, min(end + 1, last))
        return Step(got, time + self.head(asked) + self._undone(got, end), ways)

    def behind_gates(self, state: State, steps: range) -> Step:
        """Gates are asked behind each segment, and who leaves runs no further."""
        last, end, count, gone, seconds = len(self.shares) - 1, steps[-1], 0, 0.0, 0.0
        # How likely so many run.
        running = {0: 1.0}
        for front in steps:
            count += state[front]
            running = {rows + state[front]: weight for rows, weight in running.items()}
            reading = sum(weight * self.layers(rows) for rows, weight in running.items())
            # For those that have left before, keys and values are computed some time.
            seconds += self.shares[front] * (reading + self.rate * gone)
            running = _staying(running, 0.0 if front == last else 1 - self.chance)
            gone = count - sum(rows * weight for rows, weight in running.items())
        ways: dict[State, float] = {}
        for stay, weight in running.items():
            way = _moved(_without(state, steps), count - stay, stay, min(end + 1, last))
            ways[way] = ways.get(way, 0.0) + weight
            seconds += weight * self.head(count - stay)
        return Step(gone, seconds + self._undone(gone, end), ways)

    def _undone(self, gone: float, end: int) -> float:
        """Seconds of what those that leave have not computed behind a segment."""
        return gone * self.rate * sum(self.shares[end + 1 :])


def _without(state: State, steps: range) -> State:
    """The state without those that run."""
    return tuple(0 if index in steps else count for index, count in enumerate(state))


def _moved(state: State, gone: int, stay: int, behind: int) -> State:
    """The state when some have left, which begin anew, and others wait in front of a segment."""
    new = list(state)
    new[0] += gone
    new[behind] += stay
    return tuple(new)


def _staying(running: dict[int, float], chance: float) -> dict[int, float]:
    """How likely so many are left, where each stays with some probability."""
    left: dict[int, float] = {}
    for count, weight in running.items():
        for stay, likely in enumerate(_binomial(count, chance)):
            left[stay] = left.get(stay, 0.0) + weight * likely
    return left


def _spread(ways: dict[State, float], count: int, leave: float, behind: int) -> dict[State, float]:
    """Each of `count` sequences leaves with some probability, or else waits in front of segment
    `behind`."""
    spread: dict[State, float] = {}
    for way, weight in ways.items():
        for gone, likely in enumerate(_binomial(count, leave)):
            if likely:
                new = _moved(way, gone, count - gone, behind)
                spread[new] = spread.get(new, 0.0) + weight * likely
    return spread


def _binomial(count: int, chance: float) -> list[float]:
    """How likely something happens to so many of `count`, for each number from 0."""
    return [comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(count + 1)]


def _best_rate(tokens: Tensor, seconds: Tensor, moves: Tensor) -> float:
    each = torch.arange(tokens.shape[1])
    choice, rate = (tokens / seconds).argmax(dim=0), torch.tensor(0.0)
    for _ in range(50):
        # Values v and the rate r with v = tokens - r seconds + moves v, where v of one state is 0.
        system = torch.eye(len(each)).double() - moves[choice, each]
        system[:, -1] = seconds[choice, each]
        *values, rate = torch.linalg.lstsq(system, tokens[choice, each, None]).solution[:, 0]
        value = torch.stack([*values, torch.zeros_like(rate)])
        better = tokens - rate * seconds + moves @ value
        new = better.argmax(dim=0)
        stay = better[choice, each] >= better[new, each] - 1e-9
        if bool(stay.all()):
            break
        choice = torch.where(stay, choice, new)
    return float(rate)
