"""Measure the speed of decoding, and compare it with the limit set by the weights that are read.

    python benchmarks/decode.py [--model demo shape] [--dtype fp32 bf16] [--batch 1 8 32] [--quick]
    python benchmarks/decode.py --weight-dtype int8 [--model ...] [--batch ...] [--quick]

All settings of a model are measured alternately in one process, so that noise affects all of them
equally; figures are medians of the ratios of the rounds. The limit of full decoding at batch 1 is
the time of the bare matrix-vector products with all of the model's weight matrices, plain, packed
or as compiled loops, whichever is fastest. The depth at which tokens leave is forced, by a
threshold of 0 or at random. With --weight-dtype everything is measured with weights in that format,
and full decoding with them is compared with full decoding in the dtype.
"""

import argparse
import sys
from pathlib import Path

import torch
from decode_batch import measure_batch
from decode_drafts import measure_drafts
from decode_dtypes import BENCHMARKED, benchmarked_dtypes
from decode_gates import measure_gates
from decode_models import random_weights, saved_weights
from decode_single import measure_single
from decode_small_weights import measure_small_weights, quantized
from figures import FigureTable, add_json_flag

from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

DEMO = Path(__file__).resolve().parents[1] / "demo" / "run" / "checkpoint"


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
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=BENCHMARKED,
        help="default: fp32, and bf16 where that is fast on this machine's CPU",
    )
    parser.add_argument(
        "--weight-dtype", choices=("int8",), help="of matrices; default: that of --dtype"
    )
    parser.add_argument("--batch", nargs="+", type=int, choices=(1, 8, 32), default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each sequence in a round")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 20 tokens")
    add_json_flag(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or benchmarked_dtypes()
    if args.quick:
        args.rounds, args.tokens = 3, 20
    return args


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    torch.set_num_threads(args.threads)
    table = FigureTable()
    for name in dict.fromkeys(args.model):
        if name == "demo" and not DEMO.exists():
            print("demo: no checkpoint here, `make demo` makes one")
            continue
        for dtype in dict.fromkeys(args.dtype):
            table.context = {"model": name, "dtype": dtype, "threads": args.threads}
            kind = DTYPES[dtype]
            weights = random_weights(kind) if name == "shape" else saved_weights(DEMO, kind)
            if args.weight_dtype is not None:
                table.context["weight_dtype"] = args.weight_dtype
            print(", ".join(f"{key} {value}" for key, value in table.context.items()))
            model = own_model = SegmentedModel(*weights, compile_rows=True)
            own = weights
            if args.weight_dtype is not None:
                own = quantized(weights)
                own_model = SegmentedModel(*own, compile_rows=True)
            use_huge_pages()
            for batch in dict.fromkeys(args.batch):
                table.context["batch"] = batch
                if args.weight_dtype is not None:
                    measure_small_weights(weights, model, own_model, batch, args, table)
                if batch == 1:
                    measure_single(own, own_model, args, table)
                    measure_gates(own, args, table)
                    if name == "shape":
                        measure_drafts(kind, args, table)
                else:
                    measure_batch(own, own_model, batch, args, table)
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
