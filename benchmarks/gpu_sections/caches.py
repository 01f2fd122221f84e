"""Caches take memory as texts fill them, and give it back."""

import psutil
import torch

from gpu_sections.findings import SectionReport
from gpu_sections.models import (
    exits_at_quarter_and_half,
    make_engine,
    random_prompt,
    random_weights,
    release_memory,
)
from gpu_sections.sizes import Sizes
from megatron.early_exit.hardware.virtual_memory import smallest_piece
from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.page_sizes import page_bytes

_TEXTS, _SHORT, _STEPS = 16, 100, 8
_GREEDY = SamplingParams(max_tokens=_STEPS + 2, ignore_eos=True)


def check_caches(report: SectionReport, sizes: Sizes) -> None:
    """Run short texts with room for long ones, and see what memory they take."""
    shape, device = sizes.model, sizes.device
    if sizes.on_gpu:
        piece = smallest_piece(device)
        report.check(
            "memory piece by piece",
            "not possible, see the log" if piece is None else f"pieces of {piece} bytes",
            "possible",
            piece is not None,
            piece_bytes=piece,
        )
    else:
        report.skip("memory piece by piece", "a CPU's memory is there when it is written to")
    early_exit = exits_at_quarter_and_half(shape)
    weights = random_weights(shape, early_exit, device, sizes.dtype)
    length = shape.max_position_embeddings
    engine = make_engine(shape, early_exit, weights, _TEXTS, length)
    whole = _TEXTS * length // PAGE_SIZE * sum(page_bytes(engine.model))
    prompts = [random_prompt(shape, min(_SHORT, length // 2), seed) for seed in range(_TEXTS)]
    # What computing takes is there before.
    expected = [one.token_ids for one in engine.generate(prompts, _GREEDY)]
    before = _memory_in_use(device)
    requests = [engine.submit(prompt, _GREEDY) for prompt in prompts]
    for _ in range(_STEPS):
        engine.step()
    taken = _memory_in_use(device) - before
    report.check(
        f"{_TEXTS} texts of {len(prompts[0])} tokens",
        f"{taken / 2**20:.0f} MiB, {taken / whole:.3f} of {_TEXTS} contexts of {length}",
        "at most 0.2",
        taken <= 0.2 * whole,
        gpu_only="too small here for pages to show",
        bytes=taken,
        whole_bytes=whole,
    )
    while not all(request.is_finished for request in requests):
        engine.step()
    found = [request.result().token_ids for request in requests]
    left = _memory_in_use(device) - before
    report.check(
        "after the texts",
        f"{'the same tokens as before' if found == expected else 'other tokens'}, "
        f"{left / 2**20:.0f} MiB more in use than before",
        "the same tokens, and at most 64 MiB",
        found == expected and left <= 2**26,
        bytes=left,
    )


def _memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds, or on a GPU everybody."""
    release_memory(device)
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
