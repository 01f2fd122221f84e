"""Many requests at once: each gets the oracle's tokens, whatever it shares its batches with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import GPT2, HEADS, LLAMA, make_model

MODELS = {
    f"{name}-{head}": make_model(architecture, exits=(1, 3), **options)
    for name, architecture in (("llama", LLAMA), ("gpt2", GPT2))
    for head, options in HEADS.items()
}
THRESHOLDS = (0.0, 0.3, 0.6, 0.9, 1.0)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    prompt = draw(st.lists(st.integers(0, LLAMA.vocab_size - 1), min_size=1, max_size=12))
    mode = draw(st.sampled_from(["full", "early_exit", "self_speculative"]))
    fields: dict[str, object] = {}
    if mode == "early_exit":
        fields = {
            "early_exit_threshold": draw(st.sampled_from(THRESHOLDS)),
            "exit_layers": draw(st.sampled_from([None, (1,), (3,), (1, 3)])),
        }
    if mode == "self_speculative":
        fields = {
            "draft_exit_layer": draw(st.sampled_from([None, 1, 3])),
            "num_draft_tokens": draw(st.integers(1, 6)),
            "draft_confidence": draw(st.sampled_from([0.0, 0.3, 0.8])),
        }
    count = draw(st.integers(1, 10))
    return prompt, SamplingParams(max_tokens=count, mode=mode, **fields)


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(MODELS)),
    batch=st.lists(requests(), min_size=1, max_size=6),
    arrivals=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    num_slots=st.integers(1, 4),
    max_rows=st.integers(1, 20),
    max_pending=st.integers(1, 8),
    quorum=st.floats(0, 1),
)
def test_every_request_gets_the_oracles_tokens(
    name, batch, arrivals, num_slots, max_rows, max_pending, quorum
):
    model = MODELS[name]
    engine = EarlyExitEngine(
        model.segmented, max_pending=max_pending, max_batch_size=num_slots, max_sequence_length=24
    )
    engine.loop.scheduler.max_rows = max_rows
    engine.loop.scheduler.quorum = quorum
    requests_ = []
    for (prompt, params), steps in zip(batch, arrivals, strict=False):
        requests_.append(engine.submit(prompt, params))
        for _ in range(steps):
            engine.step()
    while not all(request.is_finished for request in requests_):
        engine.step()
    assert not engine.loop.requests
    for (prompt, params), request in zip(batch, requests_, strict=True):
        threshold = params.threshold if params.mode == "early_exit" else None
        expected = generate(model, prompt, params.max_tokens, threshold, params.exit_layers)
        result = request.result()
        assert result.token_ids == [token.token_id for token in expected]
        if params.mode != "self_speculative":
            assert result.exit_layers == [token.exit_layer for token in expected]
        assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=3e-4)
        assert result.confidences == pytest.approx([t.confidence for t in expected], rel=3e-4)
