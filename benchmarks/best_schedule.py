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


class _Step(NamedTuple):
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
    run = _behind_gates if gated else _before_heads
    for (a, steps), (s, state) in product(enumerate(ranges), enumerate(states)):
        if not any(state[front] for front in steps):
            continue
        step = run(state, steps, chance, shares, layers, head, rate)
        tokens[a, s], seconds[a, s] = step.tokens, step.seconds
        for way, weight in step.ways.items():
            moves[a, s, number[way]] += weight
    return _best_rate(tokens, seconds, moves)


def _before_heads(
    state: State,
    steps: range,
    chance: float,
    shares: Sequence[float],
    layers: Seconds,
    head: Seconds,
    rate: float,
) -> _Step:
    """All run to the end of the segments before their heads are evaluated."""
    last, end, rows, asked, got, time = len(shares) - 1, steps[-1], 0, 0, 0.0, 0.0
    ways = {tuple(0 if i in steps else n for i, n in enumerate(state)): 1.0}
    for front in steps:
        count = state[front]
        rows, asked = rows + count, asked + count * (end - front + 1)
        time += shares[front] * layers(rows)
        leave = 1.0 if end == last else 1 - (1 - chance) ** (end - front + 1)
        got += count * leave
        ways = _spread(ways, count, leave, min(end + 1, last))
    return _Step(got, time + head(asked) + got * rate * sum(shares[end + 1 :]), ways)


def _behind_gates(
    state: State,
    steps: range,
    chance: float,
    shares: Sequence[float],
    layers: Seconds,
    head: Seconds,
    rate: float,
) -> _Step:
    """Gates are asked behind each segment, and who leaves runs no further."""
    last, end, count, seconds = len(shares) - 1, steps[-1], 0, 0.0
    running, gone = {0: 1.0}, 0.0
    for front in steps:
        count += state[front]
        running = {rows + state[front]: weight for rows, weight in running.items()}
        seconds += shares[front] * sum(weight * layers(n) for n, weight in running.items())
        # Of those that have left before, this segment's keys and values are computed some time.
        seconds += shares[front] * rate * gone
        stays = 0.0 if front == last else 1 - chance
        left: dict[int, float] = {}
        for n, weight in running.items():
            for stay in range(n + 1):
                chance_of = comb(n, stay) * stays**stay * (1 - stays) ** (n - stay)
                left[stay] = left.get(stay, 0.0) + weight * chance_of
        gone += sum(n * weight for n, weight in running.items())
        gone -= sum(n * weight for n, weight in left.items())
        running = left
    ways: dict[State, float] = {}
    for stay, weight in running.items():
        way = [0 if i in steps else n for i, n in enumerate(state)]
        way[0] += count - stay
        way[min(end + 1, last)] += stay
        ways[tuple(way)] = ways.get(tuple(way), 0.0) + weight
        seconds += weight * head(count - stay)
    return _Step(gone, seconds + gone * rate * sum(shares[end + 1 :]), ways)


def _spread(ways: dict[State, float], count: int, leave: float, behind: int) -> dict[State, float]:
    """Each of `count` sequences leaves with some probability, or else waits in front of segment
    `behind`."""
    spread: dict[State, float] = {}
    for (way, weight), gone in product(ways.items(), range(count + 1)):
        chance = comb(count, gone) * leave**gone * (1 - leave) ** (count - gone)
        new = list(way)
        new[0] += gone
        new[behind] += count - gone
        if chance:
            spread[tuple(new)] = spread.get(tuple(new), 0.0) + weight * chance
    return spread


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
