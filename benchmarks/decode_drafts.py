"""Figures of `decode.py` for drafts that are often right."""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from decode_models import Weights, random_weights
from decode_single import LONG_TEXT
from decode_small_weights import quantized
from decode_turns import Decoder, take_turns
from figures import FigureTable, ratios

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

SHARE_BEHIND = 0.08
"""What layers behind the exit that drafts add to the residual stream, relative to the others: then
most of its drafts are right, as those of a tuned model's exit are."""
ALWAYS_ONE: dict[str, Any] = {"draft_confidence": 0.0, "num_draft_tokens": 1}
"""A random model is never sure, however right it is: so it drafts whatever it says."""


def limit(weights: Weights, rate: float) -> float:
    """The speed over full mode that the bytes allow which are read, with one draft at a time.

    Args:
        weights: of a model whose first exit drafts.
        rate: the share of drafts that is right, from 0 to 1.
    """
    segments, head = weights.segment_bytes()
    full = sum(segments) + head
    return full * (1 + rate) / (full + segments[0] + head)


def measure_drafts(dtype: torch.dtype, args: argparse.Namespace, table: FigureTable) -> None:
    """Measure one sequence at a time, for which the first exit drafts, mostly rightly."""
    weights = random_weights(dtype, SHARE_BEHIND)
    if args.weight_dtype is not None:
        weights = quantized(weights)
    decoder = Decoder(SegmentedModel(*weights, compile_rows=True), 1, LONG_TEXT)
    params = SamplingParams(mode="self_speculative", max_tokens=LONG_TEXT, ignore_eos=True)
    (result,) = decoder.engine.generate(decoder.prompts, replace(params, **ALWAYS_ONE))
    counts = result.statistics.drafts
    assert counts is not None
    rate = counts.accepted / max(counts.drafted, 1)
    drafting = partial(decoder.drafting, **ALWAYS_ONE)
    times = take_turns({"full": decoder.full, "drafting": drafting}, args.rounds)
    table.add(
        f"drafts of which {rate:.0%} are right over full, {LONG_TEXT} tokens",
        ratios(times, "full", "drafting"),
        None,
        limit(weights, rate),
        f"{LONG_TEXT / counts.verifications:.2f} tokens for a verification",
    )
