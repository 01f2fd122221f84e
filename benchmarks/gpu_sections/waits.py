"""How often the host waits for the GPU in a step of decoding."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import TextIO

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

_ROWS, _STEPS_BEFORE, _STEPS = 3, 4, 16
_EXPECTED = 1.0
_SETTINGS = {
    "greedy": SamplingParams(max_tokens=60, ignore_eos=True),
    "sampled": SamplingParams(
        max_tokens=60, ignore_eos=True, temperature=0.7, top_p=0.9, top_k=20, seed=1
    ),
}
_SIGN = "called a synchronizing CUDA operation"


def check_waits(report: SectionReport, sizes: Sizes) -> None:
    """Count the waits of greedy and of sampled steps, in mode `full`."""
    if not sizes.on_gpu:
        # Tests are not annotated for others, so they are not imported by name.
        pretended = import_module("tests.helpers.pretended_cuda")
        tiny = import_module("tests.helpers.tiny_models")
        for layers, (name, params) in product(("plain", "captured"), _SETTINGS.items()):
            is_captured = layers == "captured"
            with pretended.PretendedCuda() as cuda, ExitStack() as stack:
                if is_captured:
                    stack.enter_context(pretended.pretended_recorder(cuda))
                engine = pretended.pretended_engine(tiny.make_model(exits=(1, 3)), is_captured)
                place = f"{name}, {layers} layers, on a pretended GPU"
                _report(report, place, engine, params, cuda.waits.total)
        return
    # Each number of layers between two exits takes the compiler many seconds.
    shape = replace(sizes.model, num_layers=2)
    early_exit = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, early_exit, sizes.device, sizes.dtype)
    for layers in ("plain", "compiled"):
        engine = make_engine(
            shape, early_exit, weights, _ROWS, 128, compile_rows=layers == "compiled"
        )
        for name, params in _SETTINGS.items():
            # Kernels are chosen in a first run.
            _run_steps(engine, params, lambda: 0)
            with counted_waits() as waits:
                _report(report, f"{name}, {layers} layers", engine, params, waits.total)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count synchronising CUDA calls while the block lasts, as PyTorch warns of them.

    It yields the counts by the file and line that PyTorch blames."""
    waits: Counter[str] = Counter()

    def show(
        message: Warning | str,
        category: type[Warning],
        file: str,
        line: int,
        stream: TextIO | None = None,
        text: str | None = None,
    ) -> None:
        if _SIGN in str(message):
            waits[f"{file}:{line}"] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _report(
    report: SectionReport,
    name: str,
    engine: EarlyExitEngine,
    params: SamplingParams,
    count: Callable[[], int],
) -> None:
    waits = _run_steps(engine, params, count) / _STEPS
    # None at all would mean that nothing has been counted: the host has to read the tokens.
    report.check(
        f"waits per step, {name}",
        f"{waits:.2f}",
        f"{_EXPECTED:.0f}",
        waits == _EXPECTED,
        waits=waits,
    )


def _run_steps(engine: EarlyExitEngine, params: SamplingParams, count: Callable[[], int]) -> int:
    """What `count` has grown by in some steps of requests that are all under way."""
    shape = engine.model.architecture
    requests = [engine.submit(random_prompt(shape, 3, seed), params) for seed in range(_ROWS)]
    for _ in range(_STEPS_BEFORE):
        engine.step()
    before = count()
    for _ in range(_STEPS):
        engine.step()
    counted = count() - before
    if any(request.is_finished for request in requests):
        raise RuntimeError("a request ended while the waits of its steps were counted")
    for request in requests:
        engine.cancel(request)
    return counted
