"""Greedy decoding with and without cuDNN's attention.

The engine leaves cuDNN out (`megatron/early_exit/inference/model/segment.py`), because cuDNN builds
a plan for every new shape. This shows what that choice is worth.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_sections.agreement import TOLERANCES, agreement_of
from gpu_sections.findings import SectionReport
from gpu_sections.models import make_engine, random_prompt, random_weights, wait_for
from gpu_sections.sizes import Sizes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.model import segment

_PROMPT = 40
_BEST = 5
"""Tokens at each place among which another choice is looked up."""
_PREFIX = "aten::_scaled_dot_product_"
_WITH_CUDNN = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def check_attention(report: SectionReport, sizes: Sizes) -> None:
    """Compare tokens and times of the same greedy texts."""
    shape, no_exits, device = sizes.model, EarlyExitConfig(), sizes.device
    weights = random_weights(shape, no_exits, device, sizes.dtype)
    engine = make_engine(shape, no_exits, weights, 1, _PROMPT + sizes.greedy_tokens + 1)
    prompt = random_prompt(shape, _PROMPT)
    settings: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "without": nullcontext,
        "with": with_cudnn,
    }
    results, times, operators = {}, {}, {}
    for name, setting in settings.items():
        with setting():
            results[name] = _decode(engine, prompt, sizes.greedy_tokens)
            # What cuDNN plans for each new shape it keeps: the first round is what users meet.
            times[f"{name}, first"] = results[name].statistics.decode_seconds
            operators[name] = attention_operators(engine, prompt)
    again: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(sizes.rounds):
        for name, setting in settings.items():
            with setting():
                wait_for(device)
                start = perf_counter()
                _decode(engine, prompt, sizes.greedy_tokens)
                again[name].append(perf_counter() - start)
    for name, counts in operators.items():
        shown = ", ".join(f"{count} x {one}" for one, count in sorted(counts.items()))
        report.measure(f"attention operators {name} cuDNN", shown or "none", counts=counts)
    first = times["with, first"] / times["without, first"]
    later = median(a / b for a, b in zip(again["with"], again["without"], strict=True))
    unused = not any("cudnn" in one for one in operators["with"])
    if unused:
        # Both are then the same computation, and say nothing of cuDNN.
        why = "there is no cuDNN here" if not report.on_gpu else "PyTorch did not choose cuDNN"
        report.measure("time with cuDNN over without", f"{later:.2f}, but {why}", ratio=later)
    else:
        report.measure(
            "time with cuDNN over without",
            f"{later:.2f}, the first time {first:.2f}",
            ratio=later,
            first_ratio=first,
        )
    agreement = agreement_of([results["without"]], [results["with"]])
    tolerance = TOLERANCES[sizes.dtype]
    report.check(
        f"{sizes.greedy_tokens} greedy tokens",
        str(agreement),
        f"equal, or {tolerance:g} off",
        agreement.within(tolerance),
        # Without a GPU both are the same computation, and have to give the same all the more.
        gpu_only="both without cuDNN" if agreement.within(tolerance) else "",
        num_equal=agreement.num_equal,
        num_tokens=agreement.num_tokens,
    )


@contextmanager
def with_cudnn() -> Iterator[None]:
    """Let the engine's layers prefer cuDNN's attention while the block lasts."""

    def preferring(_: list[SDPBackend]) -> AbstractContextManager[None]:
        return sdpa_kernel(_WITH_CUDNN, set_priority=True)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with patch.object(segment, "sdpa_kernel", preferring):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attention_operators(engine: EarlyExitEngine, prompt: list[int]) -> Counter[str]:
    """The attention operators that a few steps of decoding run, and how often."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _decode(engine, prompt, 4)
    counts: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.key.startswith(_PREFIX):
            counts[event.key.removeprefix(_PREFIX)] += event.count
    return counts


def _decode(engine: EarlyExitEngine, prompt: list[int], tokens: int) -> GenerationResult:
    (result,) = engine.generate([prompt], SamplingParams(max_tokens=tokens, logprobs=_BEST))
    return result
