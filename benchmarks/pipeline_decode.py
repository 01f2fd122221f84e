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
import os
import sys
import tempfile
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
from decode_dtypes import BENCHMARKED, benchmarked_dtypes
from decode_models import SMOLLM2_135M
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


def make_engine(dtype: torch.dtype, architecture: Architecture) -> EarlyExitEngine:
    """This rank's part of the model."""
    place, _ = join(1, STAGES, "cpu")
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, shape in weight_shapes(architecture, EXITS).items():
        whole = torch.ones(shape)
        if len(shape) > 1:
            whole = torch.randn(shape, generator=generator) * shape[1] ** -0.5
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
    """Run the settings alternately; the first rank reports."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{dtype}", rank=rank, world_size=STAGES
    )
    architecture = replace(SMOLLM2_135M, max_position_embeddings=256, vocab_size=vocab_size)
    engine = make_engine(DTYPES[dtype], architecture)
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
        report(dtype, architecture, tokens, times)
    distributed.destroy_process_group()


def report(
    dtype: str, architecture: Architecture, tokens: int, times: dict[str, list[float]]
) -> None:
    """Print ratios, limits and bounds."""
    shapes = weight_shapes(architecture, EXITS)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("decoder.layers."))
    head = sizes["embedding.word_embeddings.weight"]
    share = (layers / STAGES + head) / (layers + head)
    milliseconds = {name: 1000 * median(taken) / (tokens - 1) for name, taken in times.items()}
    print(
        f"{dtype}, vocabulary {architecture.vocab_size}, {STAGES} stages, exit after layer "
        f"{EXIT_LAYER} of {architecture.num_layers}"
    )
    for name, figure in milliseconds.items():
        print(f"  {name:14} {figure:7.2f} ms from token to token")
    rows: list[tuple[str, str, str, int, float, float, str]] = [
        ("latency at the exit over full", "exit", "full", 1, share, LATENCY_BOUND, "<")
    ]
    for mode in ("full", "exit"):
        what = f"throughput of {SEQUENCES} over 1, {mode}"
        several, limit = f"{mode}, several", float(SEQUENCES)
        rows.append((what, mode, several, SEQUENCES, limit, THROUGHPUT_BOUND, ">"))
    for what, above, below, factor, limit, bound, sign in rows:
        ratios = [factor * a / b for a, b in zip(times[above], times[below], strict=True)]
        ratio = median(ratios)
        holds = ratio < bound if sign == "<" else ratio > bound
        print(
            f"  {what:34} {ratio:5.2f}  (limit {limit:.2f}, bound {sign} {bound}: "
            f"{'holds' if holds else 'MISSED'})"
        )


def main() -> None:
    """Measure each dtype in a fresh process group."""
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
    args = parser.parse_args()
    args.dtype = args.dtype or benchmarked_dtypes()
    tokens, turns = (24, 1) if args.quick else (48, 5)
    os.environ["OMP_NUM_THREADS"] = "1"
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                measure, (folder, dtype, args.vocab_size, tokens, turns), nprocs=STAGES
            )


if __name__ == "__main__":
    sys.exit(run_program(main))
