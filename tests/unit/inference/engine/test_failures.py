"""Exceptions at every place of the loop: they end whom they are about, and nobody else notices."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine import loop as decoding_loop
from megatron.early_exit.inference.engine.failures import OUT_OF_MEMORY, reason_of
from megatron.early_exit.inference.engine.head_batch import HeadBatch
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.engine.scoring import TextScorer
from megatron.early_exit.inference.engine.segment_loop import SegmentLoop
from megatron.early_exit.inference.engine.stopping import Stopping
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.mode import TokenSampler
from tests.helpers.arrivals import CONTEXT, Syllables, arrivals, play
from tests.helpers.tiny_models import HEADS, LLAMA, make_model

MODELS = {head: make_model(LLAMA, exits=(1, 3), **options) for head, options in HEADS.items()}
PLACES = {
    "a segment": (SegmentRunner, "run"),
    "heads": (HeadBatch, "outputs"),
    "a head's logits": (SegmentRunner, "exit_logits"),
    "a choice": (TokenSampler, "take"),
    "the text": (Stopping, "add"),
    "a prompt's scores": (TextScorer, "run"),
    "a new slot": (SegmentRunner, "truncate"),
    "the schedule": (Scheduler, "next"),
    "the choice of a batch": (Scheduler, "onward"),
}
ERRORS = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("a cable is loose"),
    KeyError("a key"),
)
PROMPT, GREEDY = [5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True)


def make_engine(model, num_slots=3):
    return EarlyExitEngine(
        model.segmented, Syllables(), max_batch_size=num_slots, max_sequence_length=CONTEXT
    )


def failing(place, error, call, is_behind):
    """Let the call of that number fail at a place, before or after it has done its work."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), 0

    def maybe(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not is_behind:
            raise error
        found = original(*args, **kwargs)
        if calls == call:
            raise error
        return found

    return patch.object(owner, name, maybe)


def stay(drawn):
    """The same requests, none of which is given up."""
    return [replace(arrival, given_up=None) for arrival in drawn]


def essence(result):
    return result.token_ids, result.text, result.finish_reason, result.exit_layers


@settings(max_examples=15)
@given(
    head=st.sampled_from(sorted(MODELS)),
    drawn=arrivals(),
    later=arrivals(),
    num_slots=st.integers(1, 4),
    place=st.sampled_from(sorted(PLACES)),
    error=st.sampled_from(ERRORS),
    call=st.integers(1, 12),
    is_behind=st.booleans(),
)
def test_only_those_that_an_exception_is_about_end_by_it(
    head, drawn, later, num_slots, place, error, call, is_behind
):
    engine, drawn, later = make_engine(MODELS[head], num_slots), stay(drawn), stay(later)
    expected = [essence(result) for result in play(engine, drawn)]
    expected_later = [essence(result) for result in play(engine, later)]
    is_lost = False
    with failing(place, error, call, is_behind):
        try:
            results = play(engine, drawn)
        except type(error):
            # Nobody was under way who could have been told.
            is_lost, results = True, []
            assert place == "the schedule"
            assert not engine.loop.scheduler.running
    for known, result in zip(expected, results, strict=not is_lost):
        if result.finish_reason == "error":
            assert result.error == reason_of(error)
        else:
            assert essence(result) == known
    if is_lost:
        return
    assert not engine.loop.requests
    assert not engine.loop.unscored
    assert not engine.loop.scheduler.running
    assert sorted(engine.loop.scheduler._free) == list(range(num_slots))
    assert [essence(result) for result in play(engine, later)] == expected_later


@pytest.mark.parametrize("place", ["a choice", "the text"])
def test_what_goes_wrong_with_one_request_is_about_that_one(place):
    engine = make_engine(MODELS["plain"] if "plain" in MODELS else next(iter(MODELS.values())))
    alone = engine.generate([PROMPT], GREEDY)[0].token_ids
    first, second, third = (engine.submit(PROMPT, GREEDY) for _ in range(3))
    with failing(place, ValueError("odd"), 2, is_behind=False):
        engine.step()
    assert [first.error is None, second.error is None, third.error is None].count(False) == 1
    while engine.loop.requests:
        engine.step()
    found = [one.result() for one in (first, second, third)]
    assert [one.token_ids for one in found if one.error is None] == [alone] * 2


def test_the_memory_of_a_failed_step_is_free_again():
    engine = make_engine(next(iter(MODELS.values())))
    request = engine.submit(PROMPT, GREEDY)
    original = SegmentRunner.run

    def run(self, *args, **kwargs):
        large = original(self, *args, **kwargs)
        raise MemoryError(large.shape)

    with patch.object(SegmentRunner, "run", run):
        engine.step()
    assert request.error == OUT_OF_MEMORY
    frames, trace = [], request.exception.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert frames[-1].f_code.co_name == "run"
    assert "large" not in frames[-1].f_locals


def test_a_caller_gets_the_exception_itself():
    engine = make_engine(next(iter(MODELS.values())))
    with failing("heads", RuntimeError("a cable is loose"), 2, is_behind=False):
        with pytest.raises(RuntimeError, match="a cable is loose"):
            engine.generate([PROMPT] * 2, GREEDY)
        with (
            pytest.raises(RuntimeError, match="a cable is loose"),
            failing("heads", RuntimeError("a cable is loose"), 2, is_behind=False),
        ):
            list(engine.stream(PROMPT, GREEDY))
    assert len(engine.generate([PROMPT], GREEDY)[0].token_ids) == 6


def test_an_engine_whose_device_computes_no_more_is_lost():
    engine = make_engine(next(iter(MODELS.values())))
    engine.submit(PROMPT, GREEDY)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with (
        failing("a segment", error, 1, is_behind=False),
        patch.object(decoding_loop, "is_usable", lambda device: False),
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        engine.step()


def test_a_loop_that_is_not_alone_does_not_go_on_by_itself():
    engine = make_engine(next(iter(MODELS.values())))
    engine.loop = SegmentLoop(engine.loop.runner, engine.pages, is_alone=False)
    engine.submit(PROMPT, GREEDY)
    with failing("a choice", MemoryError(), 1, is_behind=False), pytest.raises(MemoryError):
        engine.step()
