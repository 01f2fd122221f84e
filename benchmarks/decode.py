"""How fast text is decoded, beside what the weights that have to be read allow.

    python benchmarks/decode.py [--model demo shape] [--dtype fp32 bf16] [--batch 1 8 32] [--quick]

All settings of a model run in one process and take turns, so that noise meets all alike; figures
are medians of the turns' ratios. The limit of full decoding at batch 1 is the time of the bare
matrix-vector products over all of the model's weight matrices, the faster of plain and packed ones.
Depths are forced: by a threshold of 0, or by a coin in the place of the threshold.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from decode_models import HuggingFace, Weights, products, random_weights, saved_weights

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.confidence import assess
from megatron.early_exit.inference.passes import Span
from megatron.early_exit.inference.runner import SegmentRunner
from megatron.early_exit.inference.segments import SegmentedModel

DEMO = Path(__file__).resolve().parents[1] / "demo" / "run" / "checkpoint"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_LENGTH = 8
LONG_RUN = 16
"""Tokens that leave in a row before one goes through all layers."""
PROBABILITIES = (0.5, 0.8)
"""Of leaving, at each exit that is asked."""
TARGETS = {"fp32": 0.90, "bf16": 0.85}
Turn = Callable[[], float]
"""Runs a setting once; returns seconds per token."""


class Coin:
    """Stands in for a threshold: how often a confidence reaches it does not depend on it."""

    def __init__(self, probability: float, seed: int) -> None:
        self._probability, self._random = probability, random.Random(seed)

    def __le__(self, confidence: float) -> bool:
        return self._random.random() < self._probability


class EveryNth:
    """Stands in for a threshold that all confidences reach but each n-th."""

    def __init__(self, n: int) -> None:
        self._n, self._asked = n, 0

    def __le__(self, confidence: float) -> bool:
        self._asked += 1
        return self._asked % self._n > 0


class Decoder:
    """An engine of the project, with a fixed number of sequences at a time."""

    def __init__(self, model: SegmentedModel, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        length = PROMPT_LENGTH + tokens + 1
        self.engine = EarlyExitEngine(
            model, max_pending=length, max_batch_size=batch, max_sequence_length=length
        )
        generator = random.Random(0)
        size = model.architecture.vocab_size
        self.prompts = [
            [generator.randrange(size) for _ in range(PROMPT_LENGTH)] for _ in range(batch)
        ]

    def seconds_per_token(
        self, params: SamplingParams, thresholds: Sequence[object] | None = None
    ) -> float:
        """From when all sequences have begun until the first one ends, over all tokens of that."""
        engine = self.engine
        requests = [engine.submit(prompt, params) for prompt in self.prompts]
        for request, threshold in zip(requests, thresholds or [], strict=False):
            request.mode.threshold = threshold  # type: ignore[attr-defined]
        while not all(request.generated for request in requests):
            engine.loop.step()
        before, start = sum(len(request.generated) for request in requests), perf_counter()
        while not any(request.is_finished for request in requests):
            engine.loop.step()
        seconds = perf_counter() - start
        count = sum(len(request.generated) for request in requests) - before
        for request in requests:
            engine.loop.cancel(request.key)
        return seconds / count

    def full(self) -> float:
        """All layers."""
        return self.seconds_per_token(SamplingParams(max_tokens=self.tokens, ignore_eos=True))

    def leaving(self, threshold: object, exits: Sequence[int] | None = None) -> float:
        """With a threshold or what stands in for it, made for each sequence."""
        params = SamplingParams(
            max_tokens=self.tokens,
            ignore_eos=True,
            mode="early_exit",
            early_exit_threshold=0.0,
            exit_layers=None if exits is None else tuple(exits),
        )
        thresholds = [threshold(i) if callable(threshold) else threshold for i in range(self.batch)]
        return self.seconds_per_token(params, thresholds)


def recomputing(model: SegmentedModel, tokens: int) -> Turn:
    """The original's way: each step takes all tokens since the last full pass from layer 1 on."""
    runner = SegmentRunner(model, 1, PROMPT_LENGTH + tokens + 1)
    last = len(model.segments) - 1

    def turn() -> float:
        text = [1] * PROMPT_LENGTH
        seen = 0
        start = perf_counter()
        for number in range(1, tokens + 1):
            spans = [Span(0, seen, len(text))]
            with torch.inference_mode():
                hidden = runner.run(0, spans, text[seen:])
                (found,) = assess(runner.exit_logits(0, spans))
                if number % (LONG_RUN + 1) == 0:
                    for index in range(1, last + 1):
                        hidden = runner.run(index, spans)
                    (found,) = assess(runner.final_logits(hidden[-1:]))
                    seen = len(text)
            if number == 1:
                start = perf_counter()
            text.append(found.best_token)
        return (perf_counter() - start) / (tokens - 1)

    return turn


def timed(function: Callable[[], None], repeats: int) -> Turn:
    """Seconds of one call."""

    def turn() -> float:
        with torch.inference_mode():
            function()
            start = perf_counter()
            for _ in range(repeats):
                function()
        return (perf_counter() - start) / repeats

    return turn


def take_turns(settings: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Each setting once in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(rounds + 1):
        for name, turn in settings.items():
            seconds = turn()
            if number:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds."""
    return median(a / b for a, b in zip(times[above], times[below], strict=True))


class Report:
    """Prints figures, each with its limit and whether it holds."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.context: dict[str, Any] = {}

    def add(
        self, name: str, value: float, bound: float | None, limit: float, note: str = ""
    ) -> None:
        """A figure whose theoretical limit is `limit`, and that is to be `bound` or more."""
        holds = None if bound is None else value >= bound
        self.figures.append(
            {**self.context, "name": name, "value": value, "bound": bound, "limit": limit}
        )
        verdict = "" if bound is None else f"at least {bound:.2f}: {'yes' if holds else 'NO'}"
        print(f"  {name:<46}{value:7.2f}  limit {limit:6.2f}  {verdict}  {note}", flush=True)


def measure_single(
    weights: Weights, model: SegmentedModel, args: argparse.Namespace, report: Report
) -> None:
    """One sequence at a time."""
    dtype = report.context["dtype"]
    tokens = args.tokens
    decoder = Decoder(model, 1, tokens)
    longer = Decoder(model, 1, max(3 * (LONG_RUN + 1), tokens))
    matrices = [*weights.layers(0, weights.architecture.num_layers), weights.head]
    first = model.exits[0].position
    settings: dict[str, Turn] = {
        "plain": timed(products(matrices, 1, packed=False), tokens // 2),
        "packed": timed(products(matrices, 1, packed=True), tokens // 2),
        "full": decoder.full,
        "leaving": lambda: decoder.leaving(0.0, (first,)),
        "runs": lambda: longer.leaving(lambda _: EveryNth(LONG_RUN + 1), (first,)),
        "recomputing": recomputing(model, longer.tokens),
    }
    try:
        other = HuggingFace(weights)
        settings["transformers"] = lambda: other.seconds_per_token(decoder.prompts[0], tokens)
    except ImportError:
        print("  transformers is not installed: not compared")
    times = take_turns(settings, args.rounds)
    limit = "packed" if median(times["packed"]) <= median(times["plain"]) else "plain"
    full = median(times["full"])
    print(
        f"  tokens/s at batch 1: {1 / full:.1f}; bare products ({limit}): "
        f"{1 / median(times[limit]):.1f}"
    )
    report.add("full over bare products", ratio(times, limit, "full"), TARGETS[dtype], 1.0)
    if "transformers" in times:
        gain = ratio(times, "transformers", "full")
        of_limit = ratio(times, limit, "transformers")
        report.add(
            "full over transformers",
            gain,
            1.0,
            gain / ratio(times, limit, "full"),
            f"transformers over bare products {of_limit:.2f}",
        )
    segments, head = weights.segment_bytes()
    ideal = (sum(segments) + head) / (segments[0] + head)
    gain = ratio(times, "full", "leaving")
    report.add(f"leaving always after layer {first}", gain, 0.9 * ideal, ideal)
    share = 1 / (LONG_RUN + 1)
    ideal = (sum(segments) + head) / (segments[0] + head + share * (sum(segments[1:]) + head))
    gain = ratio(times, "full", "runs")
    report.add(f"runs of {LONG_RUN} exits, then all layers", gain, None, ideal)
    report.add("  over recomputing from layer 1", ratio(times, "recomputing", "runs"), 1.0, ideal)


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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=("demo", "shape"),
        default=["demo", "shape"],
        help="the demo's checkpoint, or random weights of SmolLM2-135M's shape",
    )
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, choices=(1, 8, 32), default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="of each sequence in a turn")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 20 tokens")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens = 3, 20
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    report = Report()
    for name in args.model:
        if name == "demo" and not DEMO.exists():
            print("demo: no checkpoint here, `make demo` makes one")
            continue
        for dtype in args.dtype:
            report.context = {"model": name, "dtype": dtype, "threads": args.threads}
            print(f"{name}, {dtype}, {args.threads} threads")
            kind = DTYPES[dtype]
            weights = random_weights(kind) if name == "shape" else saved_weights(DEMO, kind)
            model = SegmentedModel(*weights)
            for batch in args.batch:
                if batch == 1:
                    measure_single(weights, model, args, report)
                else:
                    measure_batch(weights, model, batch, args, report)
    if args.json:
        args.json.write_text(json.dumps(report.figures, indent=1) + "\n")
    missed = [f for f in report.figures if f["bound"] is not None and f["value"] < f["bound"]]
    if missed:
        raise SystemExit(f"{len(missed)} of the bounds do not hold")


if __name__ == "__main__":
    main()
