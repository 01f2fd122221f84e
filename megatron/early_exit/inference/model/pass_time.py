"""How long passes over a few rows take on this machine, and the module that drafts.

A pass of one row takes the time of reading the weights. How much longer one over a few rows takes,
such as a verification of drafts, depends on the processor and on what multiplies there: compiled
loops for one row or two, packed products for more. So it is measured, once, when an engine is
loaded.
"""

from collections.abc import Sequence
from time import perf_counter

import torch

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.mtp_rows import MtpRows
from megatron.early_exit.inference.model.runner import SegmentRunner

_ROUNDS = 6
"""The shortest of them counts: what else a machine does is no property of the model's. It is the
same on all ranks, which run passes together."""


@torch.inference_mode()
def pass_seconds(runner: SegmentRunner, row_counts: Sequence[int]) -> list[float]:
    """The times of passes through all layers of a process, in seconds.

    Args:
        runner: of the layers, in which no sequence is yet; its slots have more places than rows are
            asked for.
        row_counts: how many rows of a sequence each pass has.
    """
    model = runner.model
    # Not at the first position: compiled layers leave that to others.
    spans = [Span(0, 1, 1 + count) for count in row_counts]
    length = 1 + max(row_counts)
    runner.commit([Span(0, 0, length)], range(len(model.segments)))
    size = (max(row_counts), model.architecture.hidden_size)
    received = torch.zeros(size, dtype=model.dtype, device=model.device)
    times: list[list[float]] = [[] for _ in row_counts]
    for _ in range(_ROUNDS):
        for own, count, span in zip(times, row_counts, spans, strict=True):
            start = perf_counter()
            for index in range(len(model.segments)):
                if model.begins_with_tokens or index:
                    hidden = runner.run(index, [span], [0] * count)
                else:
                    hidden = runner.run(index, [span], hidden=received[:count])
            # Waits for the device.
            hidden.cpu()
            own.append(perf_counter() - start)
    runner.clear(0, length)
    runner.release(0)
    return [min(own) for own in times]


@torch.inference_mode()
def module_seconds(runner: SegmentRunner) -> float:
    """The time of asking the first depth of the multi-token-prediction module about a row, in
    seconds.

    Args:
        runner: of all layers and the module, in which no sequence is yet; its slots have two places
            at least.
    """
    model, row = runner.model, [Span(0, 0, 1)]
    runner.commit([Span(0, 0, 2)], range(len(model.segments)))
    for index in range(len(model.segments)):
        runner.run(index, row, [0])
    rows, times = MtpRows(runner), []
    for _ in range(_ROUNDS):
        start = perf_counter()
        # Waits for the device.
        model.mtp_head.logits(rows.run(1, row, [0], last_only=True)).cpu()
        times.append(perf_counter() - start)
    runner.clear(0, 2)
    runner.release(0)
    return min(times)
