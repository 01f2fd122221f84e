"""Many requests at once: each gets the oracle's tokens, whatever it shares its batches with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.modes import draft_choice, pauses
from tests.helpers.arrivals import CONTEXT, Arrival, Syllables, arrivals, assert_oracles, play
from tests.helpers.mtp_models import mtp_model
from tests.helpers.reference_pauses import SHORT_PAUSES
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, TinyModel, make_model

MODELS = {
    f"{name}-{head}": make_model(architecture, exits=(1, 3), **options)
    for name, architecture in (("llama", LLAMA), ("gpt2", GPT2))
    for head, options in HEADS.items()
}
FORESEEING = {
    f"{depths}-{repeated}-{head}": mtp_model(
        depths, repeated, noise=0.2, memory=0.03, exits=(1, 3), **HEADS[head]
    )
    for depths, repeated, head in (
        (1, False, "norm"),
        (2, False, "block"),
        (3, True, "all"),
        (3, False, "projection"),
    )
}
METHODS = (None, "exit", "auto", "mtp", "mtp")


@pytest.fixture(scope="module", autouse=True)
def short_pauses() -> Iterator[None]:
    """So that there are some at all."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT_PAUSES.items():
            patch.setattr(pauses, name, value)
        patch.setattr(draft_choice, "TRIAL", 2)
        yield


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(MODELS)),
    drawn=arrivals(),
    num_slots=st.integers(1, 4),
    max_rows=st.integers(1, 20),
    max_pending=st.integers(1, 8),
    quorum=st.floats(0, 1),
)
def test_every_request_gets_the_oracles_tokens(
    name, drawn, num_slots, max_rows, max_pending, quorum
):
    model = MODELS[name]
    engine = EarlyExitEngine(
        model.segmented,
        Syllables(),
        max_pending=max_pending,
        max_batch_size=num_slots,
        max_sequence_length=CONTEXT,
    )
    engine.loop.scheduler.max_rows = max_rows
    engine.loop.scheduler.quorum = quorum
    assert_all(engine, model, drawn)


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(FORESEEING)),
    drawn=arrivals(METHODS),
    num_slots=st.integers(1, 4),
    max_rows=st.integers(1, 20),
    num_sequences=st.integers(1, 2),
)
def test_a_module_that_drafts_changes_no_text(name, drawn, num_slots, max_rows, num_sequences):
    model = FORESEEING[name]
    # Memory for few sequences of full length: others are preempted.
    slot_bytes = sum(page_bytes(model.segmented)) * -(-CONTEXT // PAGE_SIZE)
    engine = EarlyExitEngine(
        model.segmented,
        Syllables(),
        max_batch_size=num_slots,
        max_sequence_length=CONTEXT,
        kv_cache_memory=num_sequences * slot_bytes,
    )
    engine.loop.scheduler.max_rows = max_rows
    assert_all(engine, model, drawn)


def assert_all(engine: EarlyExitEngine, model: TinyModel, drawn: list[Arrival]) -> None:
    results = play(engine, drawn)
    assert not engine.loop.requests
    for arrival, result in zip(drawn, results, strict=True):
        assert_oracles(model, arrival, result)
