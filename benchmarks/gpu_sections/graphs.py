"""Compiled layers, which on a GPU are replayed as CUDA graphs, against plain ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import psutil
import torch

from gpu_sections.agreement import TOLERANCES, Agreement, agreement_of
from gpu_sections.findings import SectionReport
from gpu_sections.models import (
    exits_at_quarter_and_half,
    make_engine,
    random_prompt,
    random_weights,
    release_memory,
)
from gpu_sections.sizes import Sizes
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams

MIB = 2**20
# Rounding hides the least in it, and graphs have to be right in every format.
DTYPE = torch.float32
Results = dict[tuple[int, int], list[GenerationResult]]


class GraphCounter:
    """How many CUDA graphs have been captured while `counted_graphs` lasts."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def counted_graphs(kind: type = torch.cuda.CUDAGraph) -> Iterator[GraphCounter]:
    """Count captures of graphs.

    Args:
        kind: the class of graphs.
    """
    counter, original = GraphCounter(), kind.capture_begin  # type: ignore[attr-defined]

    def noted(*args: object, **options: object) -> object:
        counter.count += 1
        return original(*args, **options)

    with patch.object(kind, "capture_begin", noted):
        yield counter


def check_graphs(report: SectionReport, sizes: Sizes) -> None:
    """Compare results over numbers of rows and prompt lengths; see what memory graphs take."""
    shape, device = sizes.compiled_model, sizes.device
    early_exit = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, early_exit, device, DTYPE)
    results: dict[str, Results] = {}
    taken: dict[str, int] = {}
    for name in ("plain", "compiled"):
        release_memory(device)
        before = used_memory(device)
        with counted_graphs() as graphs:
            length = max(sizes.prompt_lengths) + sizes.compared_tokens + 1
            engine = make_engine(
                *(shape, early_exit, weights, max(sizes.rows), length),
                compile_rows=name == "compiled",
                prefix_caching=True,
            )
            results[name] = run_all(engine, sizes)
            release_memory(device)
            taken[name] = used_memory(device) - before
            if name == "compiled":
                _report_memory(report, sizes, engine, graphs, taken)
        del engine
    for length in sizes.prompt_lengths:
        pairs = [(results["plain"][length, n], results["compiled"][length, n]) for n in sizes.rows]
        expected, found = ([one for pair in pairs for one in pair[side]] for side in (0, 1))
        _report_agreement(report, sizes, length, agreement_of(expected, found))


def run_all(engine: EarlyExitEngine, sizes: Sizes) -> Results:
    """Results by prompt length and number of rows; rows leave at the first exit, at an exit that
    depends on their confidence, and never."""
    params = [
        SamplingParams(max_tokens=sizes.compared_tokens, logprobs=2),
        *(
            SamplingParams(
                max_tokens=sizes.compared_tokens,
                logprobs=2,
                mode="early_exit",
                early_exit_threshold=threshold,
            )
            for threshold in (0.0, 0.1)
        ),
    ]
    found = {}
    for length in sizes.prompt_lengths:
        prompts = [
            random_prompt(engine.model.architecture, length, seed)
            for seed in range(max(sizes.rows))
        ]
        for rows in sizes.rows:
            own = [params[number % len(params)] for number in range(rows)]
            found[length, rows] = engine.generate(prompts[:rows], own)
    return found


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds: on a GPU of its memory, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def _report_agreement(
    report: SectionReport, sizes: Sizes, length: int, agreement: Agreement
) -> None:
    tolerance = TOLERANCES[DTYPE]
    rows = f"{sizes.rows[0]} to {sizes.rows[-1]} rows"
    report.check(
        f"compiled against plain, {rows}, prompts of {length}",
        str(agreement),
        f"equal, or {tolerance:g} off",
        agreement.within(tolerance),
        num_equal=agreement.num_equal,
        num_tokens=agreement.num_tokens,
        largest_difference=agreement.largest_difference,
    )


def _report_memory(
    report: SectionReport,
    sizes: Sizes,
    engine: EarlyExitEngine,
    graphs: GraphCounter,
    taken: dict[str, int],
) -> None:
    if report.on_gpu:
        extra = taken["compiled"] - taken["plain"]
        each = extra / max(graphs.count, 1)
        report.check(
            "graphs captured",
            f"{graphs.count}, {each / MIB:.1f} MiB each, {extra / MIB:.0f} MiB in all",
            "1 or more",
            graphs.count > 0,
            count=graphs.count,
            bytes_of_each=each,
        )
    else:
        report.skip("graphs captured", "compiled layers are not captured there")
    captured, device = graphs.count, sizes.device
    held = [used_memory(device)]
    for _ in range(sizes.repeats):
        run_all(engine, sizes)
        release_memory(device)
        held.append(used_memory(device))
    report.check(
        f"memory after the same requests {sizes.repeats} times more",
        f"{(held[-1] - held[0]) / MIB:+.1f} MiB, {graphs.count - captured} more graphs",
        "no more than before",
        held[-1] <= held[0] and graphs.count == captured,
        gpu_only="the host's allocator keeps what it likes",
        growth_bytes=held[-1] - held[0],
        new_graphs=graphs.count - captured,
    )
