"""Many requests at once: each gets the oracle's tokens, whatever it shares its batches with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.modes import pauses
from tests.helpers.arrivals import CONTEXT, Syllables, arrivals, assert_oracles, play
from tests.helpers.reference_pauses import SHORT_PAUSES
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, make_model

MODELS = {
    f"{name}-{head}": make_model(architecture, exits=(1, 3), **options)
    for name, architecture in (("llama", LLAMA), ("gpt2", GPT2))
    for head, options in HEADS.items()
}


@pytest.fixture(scope="module", autouse=True)
def short_pauses() -> Iterator[None]:
    """So that there are some at all."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT_PAUSES.items():
            patch.setattr(pauses, name, value)
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
    results = play(engine, drawn)
    assert not engine.loop.requests
    for arrival, result in zip(drawn, results, strict=True):
        assert_oracles(model, arrival, result)
