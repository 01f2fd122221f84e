"""Over several processes, too, pages are shared and given back without a change of any token."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed.parallel_backend import parallel_model
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from tests.helpers.reference_decoder import generate
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import HEADS, LLAMA, TinyModel, make_model

KINDS = ("norm", "block")
LAYOUTS = ((2, 1), (1, 2))
CASES = [(layout, head) for layout in LAYOUTS for head in KINDS]
TEXT = [(7 * i * i + i) % 61 for i in range(46)]
COUNT = 18
MEMORY = (1.25, 9.0)
"""For so many sequences of full length."""


@cache
def model_of(head: str) -> TinyModel:
    return make_model(LLAMA, exits=(1, 3), **HEADS[head])


@cache
def tokens_of(
    head: str,
    prompt: tuple[int, ...],
    threshold: float | None,
    exits: tuple[int, ...] | None,
    propagates: bool,
) -> list[int]:
    reference = generate(model_of(head), prompt, COUNT, threshold, exits, propagates=propagates)
    return [token.token_id for token in reference]


def requests(number: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that begin alike, in all modes."""
    choose = random.Random(number)
    fields: list[dict[str, Any]] = [
        {},
        {"mode": "early_exit", "early_exit_threshold": 0.0},
        {"mode": "early_exit", "early_exit_threshold": 0.5, "exit_layers": (3,)},
        {"mode": "self_speculative", "draft_confidence": 0.0},
        {"mode": "early_exit", "early_exit_threshold": 0.5, "kv_policy": "propagate"},
    ]
    prompts = [TEXT[: choose.choice([15, 16, 17, 33, 46])] for _ in range(8)]
    counts = [choose.choice([1, 6, COUNT]) for _ in prompts]
    params = [
        SamplingParams(max_tokens=count, **fields[i % len(fields)])
        for i, count in enumerate(counts)
    ]
    return prompts, params


def divided(head: str, layout: tuple[int, int], sequences: float) -> EarlyExitEngine:
    """An engine with memory for so many sequences."""
    model = model_of(head)
    info, _ = join(*layout, "cpu")
    parts = {
        n: own_part(info, model.architecture, model.early_exit, n, w)
        for n, w in model.weights.items()
    }
    own = {name: part for name, part in parts.items() if part is not None}
    segmented, backend = parallel_model(info, model.architecture, model.early_exit, own)
    whole = sum(page_bytes(segmented)) * LLAMA.max_position_embeddings // 16
    memory = backend.agree(-int(-sequences * whole // 1))
    return EarlyExitEngine(
        segmented, backend=backend, max_batch_size=4, kv_cache_memory=max(memory, whole)
    )


def run() -> dict[Any, Any]:
    """All models in both layouts, with little memory and with enough."""
    found: dict[Any, Any] = {}
    torch.set_num_threads(1)
    for layout, head in CASES:
        for sequences in MEMORY:
            engine = divided(head, layout, sequences)
            results = [engine.generate(*requests(number)) for number in range(2)]
            counts = engine.pages.counts
            found[layout, head, sequences] = (
                results,
                counts.preemptions,
                counts.cached_tokens,
                engine.pages.bytes_held,
            )
            engine.close()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return spawn(run, 2)


@pytest.mark.parametrize(("layout", "head"), CASES)
def test_tokens_are_the_reference_decoders(layout, head, ranks):
    for sequences in MEMORY:
        for rank, found in enumerate(ranks):
            results, *_ = found[layout, head, sequences]
            for number, round_of in enumerate(results):
                for prompt, params, result in zip(*requests(number), round_of, strict=True):
                    threshold = params.threshold if params.mode == "early_exit" else None
                    held = params.kv_policy == "propagate"
                    expected = tokens_of(head, tuple(prompt), threshold, params.exit_layers, held)
                    place = (rank, sequences, number, params.mode, len(prompt))
                    assert result.token_ids == expected[: params.max_tokens], place


@pytest.mark.parametrize(("layout", "head"), CASES)
def test_pages_are_shared_and_given_back(layout, head, ranks):
    first = ranks[0]
    _, preemptions, cached, held = first[layout, head, MEMORY[0]]
    assert preemptions > 0
    assert held == 0
    _, preemptions, cached, held = first[layout, head, MEMORY[1]]
    assert preemptions == 0
    assert cached > 100
    assert held == 0
