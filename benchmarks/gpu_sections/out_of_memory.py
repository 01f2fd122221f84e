"""A request for which there is not enough memory fails, and the engine serves the next one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from gpu_sections.findings import SectionReport
from gpu_sections.models import (
    exits_at_quarter_and_half,
    make_engine,
    random_prompt,
    random_weights,
)
from gpu_sections.sizes import Sizes
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.failures import is_out_of_memory
from megatron.early_exit.inference.model.runner import SegmentRunner

_SHORT, _LARGE_ROWS = 8, 4
_GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
# To score a prompt takes caches of its own, beside those that the engine has from the beginning.
_SCORED = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=1)


def check_out_of_memory(report: SectionReport, sizes: Sizes) -> None:
    """Let an allocation fail while requests run, and ask the same engine again."""
    shape = sizes.model
    early_exit = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, early_exit, sizes.device, sizes.dtype)
    length = max(sizes.prompt_lengths) + 16
    engine = make_engine(shape, early_exit, weights, _LARGE_ROWS, length)
    short = random_prompt(shape, _SHORT)
    (expected,) = engine.generate([short], _GREEDY)
    long = [random_prompt(shape, length - 16, seed) for seed in range(_LARGE_ROWS)]
    limit = memory_limit(sizes.device) if sizes.on_gpu else one_failing_pass()
    with limit:
        requests = [engine.submit(prompt, _SCORED) for prompt in long]
        while not all(request.is_finished for request in requests):
            engine.step()
        failed = [one for one in requests if one.error is not None]
        known = all(one.exception and is_out_of_memory(one.exception) for one in failed)
        reasons = ", ".join(sorted({str(one.error) for one in failed})) or "no error"
        how = "" if sizes.on_gpu else " (simulated)"
        report.check(
            f"requests for which there is not enough memory{how}",
            f"{len(failed)} of {len(requests)} failed: {reasons}",
            "1 or more, out of memory",
            bool(failed) and known,
            num_failed=len(failed),
        )
        report.check(
            "the next request",
            *_next_request(engine, short, expected.token_ids),
        )


def _next_request(
    engine: EarlyExitEngine, prompt: list[int], expected: list[int]
) -> tuple[str, str, bool]:
    """What was found, what the goal is, and whether it was reached."""
    request = engine.submit(prompt, _GREEDY)
    while not request.is_finished:
        engine.step()
    is_equal = request.result().token_ids == expected
    found = request.error or ("the same tokens as before" if is_equal else "other tokens")
    return found, "the same tokens as before", is_equal


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Let this process have no more of a GPU's memory than it holds already."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def one_failing_pass() -> Iterator[None]:
    """Let the first pass through a segment fail as if there were no memory for it."""
    original, calls = SegmentRunner.run, 0

    def run(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **options)

    with patch.object(SegmentRunner, "run", run):
        yield
