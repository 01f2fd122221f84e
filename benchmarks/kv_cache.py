"""Measure what the caches of keys and values take and save: memory of short texts beside that of
whole contexts, the time to the first token behind a prefix that is known, and the pages that tokens
which leave early never take.

    python benchmarks/kv_cache.py
    python benchmarks/kv_cache.py --layers 4 --prefix 300
"""

import argparse
import sys
from dataclasses import replace
from statistics import median
from time import perf_counter

import psutil
import torch
from decode_models import SMOLLM2_135M
from figures import FigureTable, add_json_flag, ratios

from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

SLOTS, CONTEXT, SHORT = 16, 8192, 100
MEMORY_BOUND = 0.1
MIB = 2**20


def model_of(layers: int) -> SegmentedModel:
    """A model of SmolLM2-135M's width with random weights, and exits at a third and two thirds of
    its layers."""
    shape = replace(SMOLLM2_135M, num_layers=layers, max_position_embeddings=CONTEXT)
    exits = tuple(sorted({max(layers // 3, 1), max(2 * layers // 3, 1)}))
    early_exit = EarlyExitConfig(exit_layer_nums=exits, use_exit_norm=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator) * 0.02
        for name, size in weight_shapes(shape, early_exit).items()
    }
    return SegmentedModel(shape, early_exit, tensors)


def texts(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = SMOLLM2_135M.vocab_size
    return torch.randint(0, size, (count, length), generator=generator).tolist()


def memory(model: SegmentedModel, table: FigureTable) -> None:
    """Memory of `SLOTS` short texts at a time, over that of whole contexts."""
    whole = SLOTS * CONTEXT * bytes_of_position(model)
    process = psutil.Process()
    engine = EarlyExitEngine(model, max_batch_size=SLOTS, prefix_caching=False)
    # What computing takes is there before.
    engine.generate(texts(1, SHORT, 0), SamplingParams(max_tokens=1))
    before = process.memory_info().rss
    engine.generate(texts(SLOTS, SHORT, 1), SamplingParams(max_tokens=8, ignore_eos=True))
    taken = process.memory_info().rss - before
    used = SLOTS * (SHORT + 8) * bytes_of_position(model)
    table.add(
        f"memory of {SLOTS} texts of {SHORT} tokens over {SLOTS} contexts of {CONTEXT}",
        taken / whole,
        MEMORY_BOUND,
        used / whole,
        f"{taken / MIB:.0f} of {whole / MIB:.0f} MiB",
        better="lower",
    )


def bytes_of_position(model: SegmentedModel) -> int:
    """Keys and values of one position, and what is kept of it at the exits."""
    shape = model.architecture
    keys_values = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    return (keys_values + len(model.exits) * shape.hidden_size) * model.dtype.itemsize


def first_tokens(model: SegmentedModel, prefix: int, rounds: int, table: FigureTable) -> None:
    """Time to the first token of a text that is unknown, and of one whose prefix is known."""
    own, params = 20, SamplingParams(max_tokens=1)
    times: dict[str, list[float]] = {"unknown": [], "known": [], "its end alone": []}
    for number in range(rounds + 1):
        engine = EarlyExitEngine(model, max_batch_size=1)
        (shared,) = texts(1, prefix, number)
        ends = texts(3, own, 100 + number)
        prompts = [shared + ends[0], shared + ends[1], ends[2]]
        for kind, prompt in zip(times, prompts, strict=True):
            start = perf_counter()
            engine.generate([prompt], params)
            if number:
                times[kind].append(perf_counter() - start)
    unknown, known, alone = (median(found) for found in times.values())
    table.add(
        f"first token behind {prefix} known and {own} own tokens, over all unknown",
        ratios(times, "known", "unknown"),
        limit=alone / unknown,
        note=f"{known * 1e3:.0f} of {unknown * 1e3:.0f} ms; the limit is the {own} tokens alone",
        better="lower",
    )


def pages(model: SegmentedModel, table: FigureTable) -> None:
    """Pages that sequences take in each segment, by how often their tokens leave early."""
    for name, threshold in (("never", None), ("always", 0.0)):
        engine = EarlyExitEngine(model, prefix_caching=False, max_pending=CONTEXT)
        params = SamplingParams(max_tokens=64, ignore_eos=True)
        if threshold is not None:
            params = replace(params, mode="early_exit", early_exit_threshold=threshold)
        engine.generate(texts(4, SHORT, 2), params)
        for segment, taken in enumerate(engine.pages.counts.taken, start=1):
            table.add(
                f"pages of 4 texts whose tokens {name} leave early, segment {segment}",
                taken,
                unit="pages",
                better="lower",
            )


def main() -> int:
    """Run all three measurements; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=30, help="of the model (default: 30)")
    parser.add_argument("--prefix", type=int, default=1000, help="known tokens (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    add_json_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(args.layers)
    table = FigureTable(layers=args.layers)
    memory(model, table)
    first_tokens(model, args.prefix, args.rounds, table)
    pages(model, table)
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
