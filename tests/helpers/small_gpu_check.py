"""Sections of `tools/gpu_check.py` in sizes that take a second on a CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from tools import gpu_check  # noqa: F401

# The tool has put the folder of these on the path.
from gpu_sections.findings import SectionReport  # isort: skip
from gpu_sections.sizes import sizes_for  # isort: skip

CPU = torch.device("cpu")
SIZES = sizes_for(CPU)
SMALL = replace(
    SIZES,
    compiled_model=replace(SIZES.model, num_layers=1, max_position_embeddings=64),
    rows=(1, 3),
    prompt_lengths=(7, 9),
    repeats=1,
    greedy_tokens=12,
    contexts=(8,),
    steps=4,
    rounds=1,
    copied_bytes=2**20,
)


def run(section, sizes=SMALL, on_gpu=False) -> SectionReport:
    report = SectionReport("one", on_gpu)
    section(report, sizes)
    return report


def by_name(report: SectionReport) -> dict[str, object]:
    found = {one.name: one for one in report.findings}
    assert len(found) == len(report.findings)
    return found


def result(tokens: str, best: str = "", gap: float = 0.0, shift: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        token_ids=list(tokens),
        logprobs=[-1.0 + shift] * len(tokens),
        top_logprobs=[
            [(t, -1.0), (b, -1.0 - gap)] for t, b in zip(tokens, best or tokens, strict=True)
        ],
    )
