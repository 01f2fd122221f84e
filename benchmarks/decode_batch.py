"""Measure decoding of several sequences at a time, of which some leave early and others go
deeper."""

import argparse
from bisect import bisect_left
from functools import partial
from itertools import pairwise
from statistics import median

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
    matrices = weights.layers(0, depth)
    settings: dict[str, Turn] = {"full 1": single.full, "full": decoder.full, "plain": plain.full}
    for policy, bounds in BOUNDS.items():
        for p in bounds:
            leaving = partial(decoder.leaving, partial(RandomExit, p), kv_policy=policy)
            settings[f"mixed {p} {policy}"] = leaving
        settings[f"depths {policy}"] = partial(longer.depths, positions, policy)
    gated = with_gates(weights, positions[0])
    assert gated.early_exit.positions == positions, "gates behind the same layers"
    gated_model = SegmentedModel(*gated, compile_rows=True)
    use_huge_pages()
    short, long = Decoder(gated_model, batch, tokens), Decoder(gated_model, batch, LONG)
    settings |= {"gated full": short.full, "gated long full": long.full}
    for p in BOUNDS["propagate"]:
        leaving = partial(short.leaving, partial(RandomExit, p), kv_policy="propagate")
        settings[f"gated mixed {p}"] = leaving
    settings["gated depths"] = partial(long.depths, positions, "propagate")
    settings |= {"long full": longer.full, "drafting": longer.drafting}
    settings |= {"in vain": longer.in_vain, "in vain, paused": partial(longer.in_vain, batch)}
    settings["bare 1"] = timed(products([*matrices, weights.head], 1, weights.dtype), 3)
    for rows in ROWS:
        settings[f"layers {rows}"] = timed(products(matrices, rows, weights.dtype), 2)
        settings[f"head {rows}"] = timed(products([weights.head], rows, weights.dtype), 2)
        if rows <= MOST_ROWS_OF_LOOPS and weights.head.scale is None:
            loops = products(matrices, rows, weights.dtype, "loops")
            settings[f"layers {rows} loops"] = timed(loops, 2)
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
    shares = [(end - start) / depth for start, end in pairwise([0, *positions, depth])]
    table.add(
        f"drafts over full, {LONG} tokens",
        ratios(times, "long full", "drafting"),
        None,
        1.0,
        "if no draft is accepted",
    )
    rate = layers(ROWS[-1]) / ROWS[-1]
    rates = {"exact": rate, "propagate": rate * held_share(weights.architecture)}
    for policy, bound in BOUNDS_OF_DEPTHS.items():
        table.add(
            f"thirds of depths over full, {policy}",
            ratios(times, "long full", f"depths {policy}"),
            bound,
            full / best_depths(batch, shares, layers, head, rates[policy]),
        )
    for policy, bounds in BOUNDS.items():
        for p, bound in bounds.items():
            best = tokens_per_second(batch, p, shares, layers, head, rates[policy])
            table.add(
                f"exits with probability {p} over full, {policy}",
                ratios(times, "full", f"mixed {p} {policy}"),
                bound,
                best * full / batch,
            )
    table.add(
        "thirds of depths over full, propagate, gates",
        ratios(times, "gated long full", "gated depths"),
        BOUNDS_OF_DEPTHS["propagate"],
        full / best_depths(batch, shares, layers, head, rates["propagate"]),
    )
    for p, bound in BOUNDS["propagate"].items():
        best = tokens_per_second(batch, p, shares, layers, head, rates["propagate"], gated=True)
        table.add(
            f"exits with probability {p} over full, propagate, gates",
            ratios(times, "gated full", f"gated mixed {p}"),
            bound,
            best * full / batch,
        )
    # So short a text has hardly ended its first pause when it ends.
    add_in_vain(table, times, longer, None)


def held_share(architecture: Architecture) -> float:
    """The share of the keys' and values' weights in a layer's."""
    heads = 2 * architecture.num_query_groups * architecture.kv_channels
    return heads * architecture.hidden_size / architecture.layer_weights
