"""Measure what huge pages gain: full mode before and after the weights have moved to them.

    python benchmarks/huge_pages.py [--batch 1 8] [--rounds 9] [--tokens 48]

The model has SmolLM2-135M's shape and random weights, in fp32 and in int8, with compiled layers.
What has moved does not move back, so all rounds before come first: noise that lasts longer than a
few rounds is not evened out. There is no limit to compare with: it depends on how many pages the
processor remembers.
"""

import argparse
import sys
from statistics import median

import torch
from decode_models import random_weights
from decode_small_weights import quantized
from decode_turns import Decoder, take_turns
from figures import FigureTable, add_json_flag

from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference.model.segmented_model import SegmentedModel


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each sequence in a round")
    add_json_flag(parser)
    return parser.parse_args()


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    weights = random_weights(torch.float32)
    models = {
        "fp32": SegmentedModel(*weights, compile_rows=True),
        "int8": SegmentedModel(*quantized(weights), compile_rows=True),
    }
    settings = {
        f"{name}, batch {batch}": Decoder(model, batch, args.tokens).full
        for name, model in models.items()
        for batch in args.batch
    }
    before = take_turns(settings, args.rounds)
    moved = use_huge_pages()
    if not moved:
        raise SystemExit("this system has no huge pages")
    after = take_turns(settings, args.rounds)
    print(f"{torch.get_num_threads()} threads, {moved // 2**20} MiB in huge pages")
    table = FigureTable(threads=torch.get_num_threads())
    for name in settings:
        slow, fast = median(before[name]), median(after[name])
        note = f"{1000 * slow:.1f} -> {1000 * fast:.1f} ms for a token"
        table.add(f"after over before, {name}", slow / fast, None, None, note)
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
