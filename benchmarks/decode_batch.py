"""Measure decoding of several sequences at a time, of which some leave early and others go
deeper."""

import argparse
from bisect import bisect_left
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from best_schedule import Seconds, tokens_per_second
from decode_gates import with_gates
from decode_models import Weights, products
from decode_turns import Decoder, Turn, add_in_vain, take_turns, timed
from figures import FigureTable, ratios

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import KVPolicy
from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference.early_exit_engine import DEFAULT_MAX_PENDING
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

BOUNDS: dict[KVPolicy, dict[float, float]] = {
    "exact": {0.5: 0.98, 0.8: 0.98},
    "propagate": {0.5: 1.0, 0.8: 1.25},
}
"""For each policy, by the probability of leaving at each exit that is evaluated."""
BOUNDS_OF_DEPTHS: dict[KVPolicy, float] = {"exact": 0.98, "propagate": 1.25}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows for which the bare products are measured."""
MOST_ROWS_OF_LOOPS = 2
"""Compiled layers have products of their own up to so many rows, but not of weights in 8 bits."""
LONG = 112
"""Tokens of a sequence that is long enough to reach the engine's limit on pending positions."""


_SIDES = 1 << 24
"""Of a coin: what a hash is rounded to."""


class RandomExit:
    """Stands in for a threshold, and lets tokens leave at random, however large the confidence is.

    The same confidence gets the same answer, since a gate's is compared more than once.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self._probability, self._seed = probability, seed

    def __le__(self, confidence: float) -> bool:
        # Numbers' hashes are the same in every process.
        return hash((self._seed, confidence)) % _SIDES < self._probability * _SIDES


def by_rows(times: dict[str, list[float]], name: str) -> Seconds:
    """Seconds of products by their number of rows, interpolated and extrapolated from those
    measured."""
    known = [
        min(
            median(times[key]) for key in (f"{name} {rows}", f"{name} {rows} loops") if key in times
        )
        for rows in ROWS
    ]

    def seconds(rows: float) -> float:
        if rows <= ROWS[0]:
            return known[0] if rows else 0.0
        high = min(bisect_left(ROWS, rows), len(ROWS) - 1)
        slope = (known[high] - known[high - 1]) / (ROWS[high] - ROWS[high - 1])
        return known[high] + slope * (rows - ROWS[high])

    return seconds


def best_depths(
    batch: int, shares: list[float], layers: Seconds, head: Seconds, rate: float
) -> float:
    """Least seconds for one token of each sequence, of which equally many stop after each segment.

    At best all sequences run in lock step, and their heads are evaluated together. What has to be
    computed of skipped layers is computed later in large batches, or with the other rows at once,
    which is free for few rows.

    Args:
        batch: number of sequences.
        shares: share of each segment in the layers.
        layers: time of all layers.
        head: time of a head.
        rate: time of what has to be computed of all layers for one row of a large batch.
    """
    kinds = len(shares)
    running = [sum(i % kinds >= k for i in range(batch)) for k in range(kinds)]
    leaving = sum(
        share * (layers(rows) + (batch - rows) * rate)
        for share, rows in zip(shares, running, strict=True)
    )
    return min(leaving, layers(batch)) + head(batch)


class Regrouping(NamedTuple):
    """A way to let sequences of a batch leave at different depths.

    Attributes:
        policy: what becomes of skipped layers.
        is_gated: the coins decide about gates, not about heads.
        short: measures exits that are taken at random.
        longer: measures fixed depths.
    """

    policy: KVPolicy
    is_gated: bool
    short: Decoder
    longer: Decoder

    @property
    def name(self) -> str:
        """What the figures call it."""
        return f"{self.policy}, gates" if self.is_gated else self.policy

    def turns(self, positions: tuple[int, ...]) -> dict[str, Turn]:
        """What is measured, with full mode of the same model, for exits after some layers."""
        model = " with gates" if self.is_gated else ""
        turns = {f"full{model}": self.short.full, f"long full{model}": self.longer.full}
        for p in BOUNDS[self.policy]:
            coins = partial(RandomExit, p)
            turns[f"mixed {p} {self.name}"] = partial(
                self.short.leaving, coins, kv_policy=self.policy
            )
        turns[f"depths {self.name}"] = partial(self.longer.depths, positions, self.policy)
        return turns

    def add(
        self,
        table: FigureTable,
        times: dict[str, list[float]],
        shares: list[float],
        layers: Seconds,
        head: Seconds,
        rate: float,
    ) -> None:
        """Report the figures; for the last four see `best_depths`."""
        batch, model = self.short.batch, " with gates" if self.is_gated else ""
        full = layers(batch) + head(batch)
        table.add(
            f"thirds of depths over full, {self.name}",
            ratios(times, f"long full{model}", f"depths {self.name}"),
            BOUNDS_OF_DEPTHS[self.policy],
            full / best_depths(batch, shares, layers, head, rate),
        )
        for p, bound in BOUNDS[self.policy].items():
            best = tokens_per_second(batch, p, shares, layers, head, rate, self.is_gated)
            table.add(
                f"exits with probability {p} over full, {self.name}",
                ratios(times, f"full{model}", f"mixed {p} {self.name}"),
                bound,
                best * full / batch,
            )


def measure_batch(
    weights: Weights,
    model: SegmentedModel,
    batch: int,
    args: argparse.Namespace,
    table: FigureTable,
) -> None:
    """Measure several sequences at a time, and report the figures."""
    tokens = args.tokens
    positions, depth = weights.early_exit.positions, weights.architecture.num_layers
    single, decoder = Decoder(model, 1, tokens), Decoder(model, batch, tokens)
    plain = Decoder(SegmentedModel(*weights), batch, tokens)
    # Long enough for what waits to reach the engine's bound.
    longer = Decoder(model, batch, LONG, DEFAULT_MAX_PENDING)
    gated = SegmentedModel(*with_gates(weights, positions), compile_rows=True)
    use_huge_pages()
    own = Decoder(gated, batch, tokens), Decoder(gated, batch, LONG, DEFAULT_MAX_PENDING)
    ways = [Regrouping(policy, False, decoder, longer) for policy in BOUNDS]
    ways.append(Regrouping("propagate", True, *own))
    settings: dict[str, Turn] = {"full 1": single.full, "plain": plain.full}
    for way in ways:
        settings |= way.turns(positions)
    settings["drafting"], settings["in vain"] = longer.drafting, longer.in_vain
    settings["in vain, paused"] = partial(longer.in_vain, batch)
    settings |= bare_products(weights)
    times = take_turns(settings, args.rounds)
    layers, head = by_rows(times, "layers"), by_rows(times, "head")
    full = layers(batch) + head(batch)
    table.add("speed in full mode", 1 / median(times["full"]), unit="tokens/s", better=None)
    table.add(
        "tokens per second over batch 1",
        ratios(times, "full 1", "full"),
        4.0 if batch == 8 else None,
        batch * median(times["bare 1"]) / full,
    )
    table.add(
        "full over that without compiled layers",
        ratios(times, "plain", "full"),
        None,
        batch * median(times["plain"]) / full,
    )
    table.add(
        f"drafts over full, {LONG} tokens",
        ratios(times, "long full", "drafting"),
        None,
        1.0,
        "if no draft is accepted",
    )
    shares = [(end - start) / depth for start, end in pairwise([0, *positions, depth])]
    rate = layers(ROWS[-1]) / ROWS[-1]
    rates = {"exact": rate, "propagate": rate * held_share(weights.architecture)}
    for way in ways:
        way.add(table, times, shares, layers, head, rates[way.policy])
    # So short a text has hardly ended its first pause when it ends.
    add_in_vain(table, times, longer, None)


def bare_products(weights: Weights) -> dict[str, Turn]:
    """The products with all matrices of layers, and with a head, for each of some numbers of
    rows."""
    matrices = weights.layers(0, weights.architecture.num_layers)
    turns = {"bare 1": timed(products([*matrices, weights.head], 1, weights.dtype), 3)}
    for rows in ROWS:
        turns[f"layers {rows}"] = timed(products(matrices, rows, weights.dtype), 2)
        turns[f"head {rows}"] = timed(products([weights.head], rows, weights.dtype), 2)
        if rows <= MOST_ROWS_OF_LOOPS and weights.head.scale is None:
            loops = products(matrices, rows, weights.dtype, "loops")
            turns[f"layers {rows} loops"] = timed(loops, 2)
    return turns


def held_share(architecture: Architecture) -> float:
    """The share of the keys' and values' weights in a layer's."""
    heads = 2 * architecture.num_query_groups * architecture.kv_channels
    return heads * architecture.hidden_size / architecture.layer_weights
