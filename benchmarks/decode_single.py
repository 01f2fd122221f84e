"""Measure decoding of one sequence, and compare it with the time of reading the weights."""

import argparse
from statistics import median
from time import perf_counter

import torch
from decode_models import HuggingFace, Weights, products
from decode_turns import (
    PROMPT_LENGTH,
    Decoder,
    Turn,
    add_in_vain,
    take_turns,
    timed,
)
from figures import FigureTable, ratios

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.engine.policy import ROWS
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.head_output import head_outputs

LONG_TEXT = 200
"""Tokens of a text in which drafts and exits have time to be found useless."""
SEVERAL_ROWS = (2, 4)
"""Rows of a verification of drafts."""
LONG_RUN = 16
"""Number of consecutive tokens that leave early before one goes through all layers."""
NEVER_SLOWER = 0.98
"""Least speed over full mode of what shall not make it slower."""
TARGETS = {"fp32": 0.90, "bf16": 0.85}


class EveryNth:
    """Stands in for a threshold that every confidence reaches except each n-th one."""

    def __init__(self, n: int) -> None:
        self._n, self._asked = n, 0

    def __le__(self, confidence: float) -> bool:
        self._asked += 1
        return self._asked % self._n > 0


def recomputing(model: SegmentedModel, tokens: int) -> Turn:
    """EE-LLM's method: each step recomputes all tokens since the last full pass from layer 1 on."""
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
                (found,) = head_outputs(runner.exit_logits(0, spans))
                if number % (LONG_RUN + 1) == 0:
                    for index in range(1, last + 1):
                        hidden = runner.run(index, spans)
                    (found,) = head_outputs(runner.final_logits(hidden[-1:]))
                    seen = len(text)
            if number == 1:
                start = perf_counter()
            text.append(found.best_token)
        return (perf_counter() - start) / (tokens - 1)

    return turn


def layers_over(model: SegmentedModel, rows: int) -> Turn:
    """All layers over so many rows of a sequence, in seconds; its text is long enough for compiled
    layers to be used."""
    # As large as caches that layers are compiled for anyway.
    runner = SegmentRunner(model, 1, PROMPT_LENGTH + LONG_TEXT + 1)
    start = LONG_TEXT // 2
    spans = [Span(0, start, start + rows)]

    def layers() -> None:
        runner.run(0, spans, [1] * rows)
        for index in range(1, len(model.segments)):
            runner.run(index, spans)

    return timed(layers, LONG_RUN)


def measure_single(
    weights: Weights, model: SegmentedModel, args: argparse.Namespace, table: FigureTable
) -> None:
    """Measure one sequence at a time, and report the figures. With weights in 8 bits there is
    nothing of PyTorch or transformers to compare with."""
    in_8_bits = weights.head.scale is not None
    tokens = args.tokens
    decoder = Decoder(model, 1, tokens)
    long = Decoder(model, 1, LONG_TEXT)
    longer = Decoder(model, 1, max(3 * (LONG_RUN + 1), tokens))
    matrices = [*weights.layers(0, weights.architecture.num_layers), weights.head]
    first = model.exits[0].position
    settings: dict[str, Turn] = {
        "packed": timed(products(matrices, 1, weights.dtype), tokens // 2),
        "full": decoder.full,
        "uncompiled": Decoder(SegmentedModel(*weights), 1, tokens).full,
        "leaving": lambda: decoder.leaving(0.0, (first,)),
        "runs": lambda: longer.leaving(lambda _: EveryNth(LONG_RUN + 1), (first,)),
        "long full": long.full,
        "drafting": long.drafting,
        "in vain": long.in_vain,
        "in vain, paused": lambda: long.in_vain(1),
        "recomputing": recomputing(model, longer.tokens),
        **{f"{rows} rows": layers_over(model, rows) for rows in (1, *SEVERAL_ROWS)},
    }
    if not in_8_bits:
        for kind in ("plain", "loops"):
            settings[kind] = timed(products(matrices, 1, weights.dtype, kind), tokens // 2)
        try:
            other = HuggingFace(weights)
            settings["transformers"] = lambda: other.seconds_per_token(decoder.prompts[0], tokens)
        except ImportError:
            print("  transformers is not installed: not compared")
    times = take_turns(settings, args.rounds)
    kinds = {"packed", "plain", "loops"} & set(times)
    limit = min(kinds, key=lambda name: median(times[name]))
    for name, found in (("full mode", "full"), ("bare products", limit)):
        speed = 1 / median(times[found])
        note = limit if found == limit else ""
        table.add(f"speed of {name}", speed, note=note, unit="tokens/s", better=None)
    target = None if in_8_bits else TARGETS[str(table.context["dtype"])]
    table.add("full over bare products", ratios(times, limit, "full"), target, 1.0)
    table.add(
        "full over bare products without compiled layers",
        ratios(times, limit, "uncompiled"),
        None,
        1.0,
    )
    if "transformers" in times:
        gain = ratios(times, "transformers", "full")
        of_limit = median(ratios(times, limit, "transformers"))
        table.add(
            "full over transformers",
            gain,
            1.0,
            median(gain) / median(ratios(times, limit, "full")),
            f"transformers over bare products {of_limit:.2f}",
        )
    segments, head = weights.segment_bytes()
    ideal = (sum(segments) + head) / (segments[0] + head)
    gain = ratios(times, "full", "leaving")
    table.add(f"leaving always after layer {first}", gain, 0.9 * ideal, ideal)
    share = 1 / (LONG_RUN + 1)
    ideal = (sum(segments) + head) / (segments[0] + head + share * (sum(segments[1:]) + head))
    gain = ratios(times, "full", "runs")
    table.add(f"runs of {LONG_RUN} exits, then all layers", gain, None, ideal)
    gain = ratios(times, "recomputing", "runs")
    table.add("runs of exits over recomputing from layer 1", gain, 1.0, ideal)
    readings = decoder.engine.readings
    for rows in SEVERAL_ROWS:
        counted = (ROWS["cpu"] * readings.of(rows) + rows) / (ROWS["cpu"] + 1)
        table.add(
            f"layers over {rows} rows over those over one",
            ratios(times, f"{rows} rows", "1 rows"),
            limit=1.0,
            note=f"accounts of drafts count with {counted:.2f}",
            better="lower",
        )
    drafts = SamplingParams().num_draft_tokens
    whole = drafts * (segments[0] + head) + sum(segments) + head
    ideal = (drafts + 1) * (sum(segments) + head) / whole
    table.add(
        f"drafts after layer {first} over full, {LONG_TEXT} tokens",
        ratios(times, "long full", "drafting"),
        NEVER_SLOWER,
        ideal,
        "if every draft is accepted",
    )
    add_in_vain(table, times, long, NEVER_SLOWER)
