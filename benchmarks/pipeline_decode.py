"""Measure what decoding on two pipeline stages gains from an exit on the first stage, and from
several sequences.

    python benchmarks/pipeline_decode.py [--dtype fp32 bf16] [--vocab-size N] [--quick]

The model has the layers of SmolLM2-135M (random weights) and an exit at the end of the first stage,
and runs in two processes with one thread each. The default vocabulary makes a projection 7 % of the
weights, as in Llama-3-8B; with SmolLM2's own 49152 tokens it is 21 %. All settings are measured
alternately in one process group; figures are medians of the ratios of the rounds. The limit of the
exit's latency is the share of the weights that are read before the token is known: those of the
first stage's layers and the exit's projection, divided by those of all layers and the final
projection. The limit of the throughput is the number of sequences, as if the weights were read once
for all of them.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from decode_dtypes import BENCHMARKED, benchmarked_dtypes
from decode_models import SMOLLM2_135M
from figures import FigureTable, add_json_flag, ratios
from torch import distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed.parallel_backend import parallel_model
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.process_family import run_program

STAGES = 2
SEQUENCES = 4
EXIT_LAYER = SMOLLM2_135M.num_layers // STAGES
EXITS = EarlyExitConfig(exit_layer_nums=(EXIT_LAYER,), use_exit_norm=True)
LATENCY_BOUND, THROUGHPUT_BOUND = 0.65, 1.5
_TIMES = "times.json"


def shape(vocab_size: int) -> Architecture:
    """SmolLM2's layers with a vocabulary of this size."""
    return replace(SMOLLM2_135M, max_position_embeddings=256, vocab_size=vocab_size)


def make_engine(dtype: torch.dtype, architecture: Architecture) -> EarlyExitEngine:
    """This rank's part of the model."""
    place, _ = join(1, STAGES, "cpu")
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, size in weight_shapes(architecture, EXITS).items():
        whole = torch.ones(size)
        if len(size) > 1:
            whole = torch.randn(size, generator=generator) * size[1] ** -0.5
        part = own_part(place, architecture, EXITS, name, whole.to(dtype))
        if part is not None:
            parts[name] = part
    model, backend = parallel_model(place, architecture, EXITS, parts, compile_rows=True)
    return EarlyExitEngine(model, max_batch_size=SEQUENCES, backend=backend)


def seconds(engine: EarlyExitEngine, params: SamplingParams, count: int) -> float:
    """Seconds from the first tokens of `count` sequences to their last ones."""
    # Whatever a turn has left in the later stage is through when this is.
    engine.generate([[1]], SamplingParams(max_tokens=1))
    began = perf_counter()
    results = engine.generate([[7, 8, 9 + i] for i in range(count)], params)
    return perf_counter() - began - max(r.statistics.prefill_seconds for r in results)


def measure(rank: int, folder: str, dtype: str, vocab_size: int, tokens: int, turns: int) -> None:
    """Run the settings alternately; the first rank writes the times of each to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{dtype}", rank=rank, world_size=STAGES
    )
    engine = make_engine(DTYPES[dtype], shape(vocab_size))
    full = SamplingParams(max_tokens=tokens)
    leaving = SamplingParams(mode="early_exit", early_exit_threshold=0.0, max_tokens=tokens)
    settings = {
        "full": (full, 1),
        "exit": (leaving, 1),
        "full, several": (full, SEQUENCES),
        "exit, several": (leaving, SEQUENCES),
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(turns + 1):
        for name, setting in settings.items():
            taken = seconds(engine, *setting)
            if turn:
                times[name].append(taken)
    engine.close()
    if rank == 0:
        Path(folder, _TIMES).write_text(json.dumps(times))
    distributed.destroy_process_group()


def report(
    table: FigureTable, architecture: Architecture, tokens: int, times: dict[str, list[float]]
) -> None:
    """Add the figures of a dtype, with their limits and bounds."""
    shapes = weight_shapes(architecture, EXITS)
    sizes = {name: torch.Size(one).numel() for name, one in shapes.items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("decoder.layers."))
    head = sizes["embedding.word_embeddings.weight"]
    share = (layers / STAGES + head) / (layers + head)
    for name, taken in times.items():
        milliseconds = [1000 * one / (tokens - 1) for one in taken]
        table.add(f"from token to token, {name}", milliseconds, unit="ms", better=None)
    latency = ratios(times, "exit", "full")
    table.add("latency at the exit over full", latency, LATENCY_BOUND, share, better="lower")
    for mode in ("full", "exit"):
        gain = [SEQUENCES * one for one in ratios(times, mode, f"{mode}, several")]
        name = f"throughput of {SEQUENCES} sequences over 1, {mode}"
        table.add(name, gain, THROUGHPUT_BOUND, SEQUENCES)


def main() -> int:
    """Measure each dtype in a fresh process group; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=BENCHMARKED,
        help="default: fp32, and bf16 where that is fast on this machine's CPU",
    )
    parser.add_argument("--vocab-size", type=int, default=13888)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    add_json_flag(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or benchmarked_dtypes()
    tokens, turns = (24, 1) if args.quick else (48, 5)
    os.environ["OMP_NUM_THREADS"] = "1"
    table = FigureTable(vocab_size=args.vocab_size)
    for dtype in dict.fromkeys(args.dtype):
        print(
            f"{dtype}, vocabulary {args.vocab_size}, {STAGES} stages, exit after layer "
            f"{EXIT_LAYER} of {SMOLLM2_135M.num_layers}"
        )
        table.context["dtype"] = dtype
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                measure, (folder, dtype, args.vocab_size, tokens, turns), nprocs=STAGES
            )
            times = json.loads(Path(folder, _TIMES).read_text())
        report(table, shape(args.vocab_size), tokens, times)
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(run_program(main))
