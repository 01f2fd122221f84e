"""An engine whose caches on a GPU take memory as sequences fill them, on stand-ins for both."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.failures import OUT_OF_MEMORY
from tests.helpers.mtp_models import mtp_model
from tests.helpers.pretended_cuda import (
    CudaTensor,
    PretendedCuda,
    pretended_engine,
    pretended_recorder,
)
from tests.helpers.pretended_gpu_memory import PretendedDriver, pretended_gpu_memory
from tests.helpers.tiny_models import HEADS, LLAMA, make_model

SHAPE = replace(LLAMA, max_position_embeddings=64)
PREFIX = [7 + i % 50 for i in range(35)]
PROMPTS = [[*PREFIX, 3], [5, 17, 3], [*PREFIX, 9], [*PREFIX[:20], 1]]
PARAMS = [
    SamplingParams(max_tokens=6),
    SamplingParams(max_tokens=32, mode="early_exit", early_exit_threshold=0.3),
    SamplingParams(max_tokens=12, mode="self_speculative", draft_confidence=0.0),
    SamplingParams(max_tokens=14, mode="early_exit", early_exit_threshold=0.0),
]


@contextmanager
def gpu(is_captured: bool = False) -> Iterator[PretendedDriver]:
    """A pretended GPU, on which nothing is left in the end."""
    with (
        PretendedCuda() as mode,
        pretended_recorder(mode) if is_captured else nullcontext(),
        pretended_gpu_memory(tensor=CudaTensor) as driver,
    ):
        yield driver
        gc.collect()
    assert mode.mixed == []
    assert (driver.taken, driver.reserved) == (0, 0)


@pytest.mark.parametrize(
    ("heads", "is_captured", "num_pieces"),
    [("norm", False, 1000), ("block", False, 20), ("norm", True, 16)],
)
def test_texts_are_those_of_a_cpu(heads, is_captured, num_pieces):
    """Also with so little memory that sequences have to give it back and come again."""
    model = make_model(SHAPE, exits=(1, 3), **HEADS[heads])
    expected = EarlyExitEngine(model.segmented).generate(PROMPTS, PARAMS)
    with gpu(is_captured) as driver:
        budget = num_pieces * driver.piece
        engine = pretended_engine(model, is_captured, max_batch_size=3, kv_cache_memory=budget)
        found = engine.generate(PROMPTS, PARAMS)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.exit_layers for one in found] == [one.exit_layers for one in expected]
        assert driver.zeros_are_zero()
        counts = engine.pages.counts
        assert (counts.preemptions > 0) == (num_pieces < 100)
        assert counts.cached_tokens > 0 or num_pieces < 100
        # All has been counted but for the zeros that show where there is nothing: one piece for
        # the keys and values of all layers, one for each block, one for what is kept at exits.
        zeros = (4 if heads == "block" else 2) * driver.piece
        assert zeros < driver.most_taken <= budget + zeros
        # The memory of sequences that have ended is given back.
        assert driver.taken == zeros
        del engine


def test_a_module_that_drafts_takes_its_memory_as_it_needs_it():
    model = mtp_model(2, noise=0.2, architecture=SHAPE)
    drafting = {"mode": "self_speculative", "draft_method": "mtp", "draft_confidence": 1e-9}
    params = [SamplingParams(max_tokens=30, **drafting)] * len(PROMPTS)
    expected = EarlyExitEngine(model.segmented).generate(PROMPTS, params)
    with gpu() as driver:
        budget = 30 * driver.piece
        engine = pretended_engine(model, max_batch_size=3, kv_cache_memory=budget)
        found = engine.generate(PROMPTS, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.exit_layers for one in found] == [one.exit_layers for one in expected]
        assert driver.zeros_are_zero()
        assert engine.pages.counts.preemptions > 0
        # Of the layers, of each depth, and of what depths begin with.
        zeros = 4 * driver.piece
        assert zeros < driver.most_taken <= budget + zeros
        assert driver.taken == zeros
        del engine


def test_who_leaves_early_takes_no_memory_behind():
    model = make_model(SHAPE, exits=(1, 3))
    taken = []
    with gpu() as driver:
        for fields in ({}, {"mode": "early_exit", "early_exit_threshold": 0.0}):
            engine = pretended_engine(model, prefix_caching=False)
            engine.submit([5, 17, 3], SamplingParams(max_tokens=60, **fields))
            for _ in range(40):
                engine.step()
            taken.append(driver.taken // driver.piece)
            del engine
            gc.collect()
    # Two zeros; 43 positions are two pieces of each of four layers, and of what is kept at two
    # exits. Behind the first exit there is only what the prompt has taken.
    assert taken == [2 + 8 + 4, 2 + 2 + 2]


def test_a_sequence_for_which_there_is_no_memory_fails_alone():
    model = make_model(SHAPE, exits=(1, 3))
    with gpu() as driver:
        engine = pretended_engine(model, prefix_caching=False)
        (expected,) = engine.generate([[5, 17, 3]], SamplingParams(max_tokens=8))
        request = engine.submit([8] * 30, SamplingParams(max_tokens=60))
        engine.step()
        # Somebody else has taken what was free when the engine began.
        driver.limit = driver.taken
        while not request.is_finished:
            engine.step()
        assert request.error == OUT_OF_MEMORY
        assert len(request.sequence.generated) == 3
        (again,) = engine.generate([[5, 17, 3]], SamplingParams(max_tokens=8))
        assert again.token_ids == expected.token_ids
        del engine, request
