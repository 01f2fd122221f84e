"""Measure decoding with weights in 8 bits against the same weights in the model's format."""

import argparse
from statistics import median

from decode_models import Weights
from decode_turns import Decoder, Turn, take_turns
from figures import FigureTable, ratios

from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.weight_dtype import WeightQuantizer


def quantized(weights: Weights) -> Weights:
    """The model with its matrices in 8 bits, those of the heads, too."""
    quantizer = WeightQuantizer(weights.dtype, Quantization())
    return weights._replace(tensors=quantizer.of_model(weights.tensors))


def measure_small_weights(
    weights: Weights,
    model: SegmentedModel,
    small: SegmentedModel,
    batch: int,
    args: argparse.Namespace,
    table: FigureTable,
) -> None:
    """Measure full decoding of some sequences at a time with both weights, and report the ratio.

    The limit is that of the bytes that a step reads: a number of 8 bits for each weight.
    """
    dtype = str(table.context["dtype"])
    decoders = {
        dtype: Decoder(model, batch, args.tokens),
        "int8": Decoder(small, batch, args.tokens),
        f"plain {dtype}": Decoder(SegmentedModel(*weights), batch, args.tokens),
        "plain int8": Decoder(SegmentedModel(*quantized(weights)), batch, args.tokens),
    }
    settings: dict[str, Turn] = {name: decoder.full for name, decoder in decoders.items()}
    times = take_turns(settings, args.rounds)
    speed = 1 / median(times["int8"])
    table.add("speed in int8", speed, unit="tokens/s", better=None)
    matrices = [*weights.layers(0, weights.architecture.num_layers), weights.head]
    limit = sum(one.values.nbytes for one in matrices) / sum(one.values.numel() for one in matrices)
    table.add(f"int8 over {dtype}", ratios(times, dtype, "int8"), None, limit)
    table.add(
        f"int8 over {dtype} without compiled layers",
        ratios(times, f"plain {dtype}", "plain int8"),
        None,
        limit,
    )
