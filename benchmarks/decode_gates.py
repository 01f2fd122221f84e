"""Figures of `decode.py` for the gates of exits: what they cost where no token leaves."""

import argparse

import torch
from decode_models import Weights
from decode_single import LONG_TEXT
from decode_turns import Decoder, take_turns
from figures import FigureTable, ratios

from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

LAYERS_BETWEEN = (5, 1)
"""An exit after every so many layers."""
MOST_OF_A_STEP = 0.01
"""What a gate may cost."""


def with_gates(weights: Weights, positions: tuple[int, ...]) -> Weights:
    """The same backbone, with exits after some layers that share its final head and have gates."""
    early_exit = EarlyExitConfig(
        exit_layer_nums=positions, share_final_head=True, use_exit_gate=True, exit_measure="gate"
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {name: one for name, one in weights.tensors.items() if not name.startswith("exits.")}
    for name, shape in weight_shapes(weights.architecture, early_exit).items():
        if name not in tensors:
            # So the logits of gates, which see a residual stream at unit RMS, are about 1 in size.
            random = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            tensors[name] = random.to(weights.dtype)
    return Weights(weights.architecture, early_exit, tensors)


def measure_gates(weights: Weights, args: argparse.Namespace, table: FigureTable) -> None:
    """Measure one sequence at a time that asks all gates for each token, and never leaves."""
    for layers in LAYERS_BETWEEN:
        positions = tuple(range(layers, weights.architecture.num_layers, layers))
        own, count = with_gates(weights, positions), len(positions)
        decoder = Decoder(SegmentedModel(*own, compile_rows=True), 1, LONG_TEXT)
        settings = {"full": decoder.full, "in vain": decoder.in_vain}
        times = take_turns(settings, args.rounds)
        table.add(
            f"{count} gates asked in vain over full",
            ratios(times, "full", "in vain"),
            1 / (1 + count * MOST_OF_A_STEP),
            1.0,
            f"{LONG_TEXT} tokens",
        )
