"""How fast tokens are decoded, against the time in which the memory can be read."""

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

from gpu_sections.findings import SectionReport
from gpu_sections.models import (
    exits_at_quarter_and_half,
    make_engine,
    random_prompt,
    random_weights,
    release_memory,
    wait_for,
)
from gpu_sections.sizes import Sizes
from gpu_sections.step_limits import copy_bandwidth, step_bytes
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams

SHARE_GOAL, EXIT_GOAL, LONG_GOAL = 0.70, 0.90, 1.5
"""Of the bandwidth at batch 1; of the ideal speed-up by an exit; times the least time, for the
largest batch with the longest context."""
_TINY = "a tiny model, whose time is Python's"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Measured steps.

    Attributes:
        seconds: of a step in which each sequence gets a token.
        context: positions of a sequence, in the mean over the steps.
        exit_layers: where the tokens came from.
    """

    seconds: float
    context: float
    exit_layers: frozenset[int]


def check_decoding(report: SectionReport, sizes: Sizes) -> None:
    """Measure batches and contexts, with plain layers first and then, on a GPU, with compiled
    ones."""
    shape, device = sizes.large_model, sizes.device
    bandwidth = copy_bandwidth(device, sizes.copied_bytes)
    release_memory(device)
    report.measure(
        "bandwidth of the memory, by a copy",
        f"{bandwidth / 1e12:.3f} TB/s",
        bytes_per_second=bandwidth,
    )
    early_exit = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, early_exit, device, sizes.dtype)
    batch = max(sizes.batches)
    # While the last sequence of a batch begins, the first ones go on.
    length = max(sizes.contexts) + most_tokens(sizes, batch) + 1
    for layers in ("plain", "compiled") if sizes.compiles_large_model else ("plain",):
        engine = make_engine(
            *(shape, early_exit, weights, batch, length),
            compile_rows=layers == "compiled",
            prefix_caching=True,
        )
        for context in sizes.contexts:
            for rows in sizes.batches:
                name = f"{layers}, batch {rows}, context {context}"
                if rows > engine.max_batch_size:
                    fits = f"{engine.max_batch_size} sequences fit into the memory"
                    report.check(name, fits, f"{rows} sequences", False)
                else:
                    _measure_batch(report, sizes, engine, name, rows, context, bandwidth)
        del engine
        release_memory(device)


def most_tokens(sizes: Sizes, batch: int) -> int:
    """Tokens after which a sequence ends at the latest."""
    return 2 * (sizes.steps + batch)


def _measure_batch(
    report: SectionReport,
    sizes: Sizes,
    engine: EarlyExitEngine,
    name: str,
    rows: int,
    context: int,
    bandwidth: float,
) -> None:
    shape, itemsize = engine.model.architecture, engine.model.dtype.itemsize
    full = step_time(engine, sizes, rows, context, None)
    read = step_bytes(shape, shape.num_layers, itemsize, rows, full.context)
    share = read / bandwidth / full.seconds
    figures = {"seconds": full.seconds, "bytes": read, "share_of_bandwidth": share}
    found = f"{full.seconds * 1e3:.3f} ms a step, {share:.2f} of the bandwidth"
    if rows == 1:
        holds = share >= SHARE_GOAL
        report.check(name, found, f"{SHARE_GOAL:.2f} or more", holds, _TINY, **figures)
    elif rows == max(sizes.batches) and context == max(sizes.contexts):
        found += f", {1 / share:.2f} times the least"
        holds = 1 / share <= LONG_GOAL
        report.check(name, found, f"{LONG_GOAL} times or less", holds, _TINY, **figures)
    else:
        report.measure(name, found, **figures)
    for layer in engine.exit_layers:
        leaving = step_time(engine, sizes, rows, context, layer)
        if leaving.exit_layers != {layer}:
            found = f"tokens came from layers {sorted(leaving.exit_layers)}"
            report.check(f"{name}, exit {layer}", found, f"all from layer {layer}", False)
            continue
        ideal = read / step_bytes(shape, layer, itemsize, rows, leaving.context)
        gain = full.seconds / leaving.seconds
        report.check(
            f"{name}, exit {layer}",
            f"{leaving.seconds * 1e3:.3f} ms a step, {gain:.2f} times as fast, ideal {ideal:.2f}",
            f"{EXIT_GOAL * ideal:.2f} times or more",
            gain >= EXIT_GOAL * ideal,
            _TINY,
            seconds=leaving.seconds,
            gain=gain,
            ideal_gain=ideal,
        )


def step_time(
    engine: EarlyExitEngine, sizes: Sizes, rows: int, context: int, exit_layer: int | None
) -> StepTime:
    """Time steps of full decoding, or of tokens that all leave at an exit.

    All sequences have the same prompt, whose keys and values are computed once and copied: each
    reads its own all the same."""
    params = SamplingParams(max_tokens=most_tokens(sizes, rows), ignore_eos=True)
    if exit_layer is not None:
        params = replace(
            params, mode="early_exit", early_exit_threshold=0.0, exit_layers=(exit_layer,)
        )
    prompt = random_prompt(engine.model.architecture, context)
    # Kernels are chosen in the first round.
    rounds = [_round(engine, sizes, [prompt] * rows, params) for _ in range(1 + sizes.rounds)][1:]
    return StepTime(
        median(one.seconds for one in rounds),
        median(one.context for one in rounds),
        frozenset().union(*(one.exit_layers for one in rounds)),
    )


def _round(
    engine: EarlyExitEngine, sizes: Sizes, prompts: list[list[int]], params: SamplingParams
) -> StepTime:
    requests = [engine.submit(prompts[0], params)]
    while not requests[0].tokens:
        engine.step()
    # Only a text that has ended leaves its keys and values to others.
    if len(prompts) > 1:
        engine.cancel(requests.pop())
        requests = [engine.submit(prompt, params) for prompt in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    before = [len(request.tokens) for request in requests]
    wait_for(engine.model.device)
    start, wanted = perf_counter(), sum(before) + sizes.steps * len(requests)
    while sum(len(request.tokens) for request in requests) < wanted:
        engine.step()
        for request in requests:
            if request.is_finished:
                reason = request.error or "too many tokens came before the last one began"
                raise RuntimeError(f"a sequence ended while its steps were timed: {reason}")
    wait_for(engine.model.device)
    seconds = perf_counter() - start
    after = [len(request.tokens) for request in requests]
    new = [
        token
        for request, first in zip(requests, before, strict=True)
        for token in request.tokens[first:]
    ]
    for request in requests:
        engine.cancel(request)
    steps = len(new) / len(requests)
    middle = sum(before + after) / (2 * len(requests))
    layers = frozenset(token.exit_layer for token in new)
    return StepTime(seconds / steps, len(prompts[0]) + middle, layers)
