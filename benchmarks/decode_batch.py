"""Decoding several sequences at a time, of which some leave and others go deeper."""

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from decode_models import Weights, products
from decode_turns import Decoder, Report, Turn, ratio, take_turns, timed

from megatron.early_exit.inference.segments import SegmentedModel

PROBABILITIES = (0.5, 0.8)
"""Of leaving, at each exit that is asked."""


class Coin:
    """Stands in for a threshold: how often a confidence reaches it does not depend on it."""

    def __init__(self, probability: float, seed: int) -> None:
        self._probability, self._random = probability, random.Random(seed)

    def __le__(self, confidence: float) -> bool:
        return self._random.random() < self._probability


def least_seconds(times: dict[str, list[float]], rows: Sequence[int], batch: int) -> float:
    """Of the products of a layer for `batch` rows, if batches may be as large as one likes."""
    return min(median(times[f"layer {n}"]) / n * batch for n in rows if n >= batch)


def measure_batch(
    weights: Weights, model: SegmentedModel, batch: int, args: argparse.Namespace, report: Report
) -> None:
    """Several sequences at a time."""
    tokens = args.tokens
    single, decoder = Decoder(model, 1, tokens), Decoder(model, batch, tokens)
    layers = weights.architecture.num_layers
    some = weights.layers(0, layers)
    rows = [batch, 2 * batch, 4 * batch, 256]
    settings: dict[str, Turn] = {"full 1": single.full, "full": decoder.full}
    for p in PROBABILITIES:
        settings[f"mixed {p}"] = lambda p=p: decoder.leaving(lambda i: Coin(p, i))
    settings["head"] = timed(products([weights.head], batch, packed=True), 3)
    settings["bare 1"] = timed(products([*some, weights.head], 1, packed=True), 3)
    for count in rows:
        settings[f"layer {count}"] = timed(products(some, count, packed=True), 2)
    times = take_turns(settings, args.rounds)
    head, backbone = median(times["head"]), median(times[f"layer {batch}"])
    print(f"  tokens/s at batch {batch}: {1 / median(times['full']):.1f}")
    report.add(
        f"batch {batch} over batch 1",
        ratio(times, "full 1", "full"),
        4.0 if batch == 8 else None,
        batch * median(times["bare 1"]) / (head + backbone),
    )
    least = least_seconds(times, rows, batch)
    cuts = [0, *weights.early_exit.positions, layers]
    for p in PROBABILITIES:
        reached, ideal = 1.0, 0.0
        for start, end in pairwise(cuts):
            # Every position goes through every segment in the end, but in larger batches.
            share = (end - start) / layers
            ideal += share * max(reached * backbone, least) + reached * head
            reached *= 1 - p
        gain = ratio(times, "full", f"mixed {p}")
        report.add(
            f"exits with probability {p} over full, batch {batch}",
            gain,
            0.98,
            (head + backbone) / ideal,
        )
