"""Whichever exits draft, and however often they change, the text is the full model's."""

from __future__ import annotations

import pytest

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.modes.mode import MTP
from tests.helpers.mtp_models import mtp_model
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import HEADS, make_model
from tests.helpers.turns import drafting_in_turns

PROMPTS = [[5, 17, 3, 44, 8], [9] * 3, [(7 * i * i + i) % 61 for i in range(PAGE_SIZE + 5)]]
COUNT = 15
AUTO = SamplingParams(mode="self_speculative", draft_method="auto", max_tokens=COUNT)


@pytest.mark.parametrize("heads", ["norm", "mlp"])
def test_texts_are_the_full_models(heads):
    model = make_model(exits=(1, 2, 3), **HEADS[heads])
    size = sum(page_bytes(model.segmented)) * 4
    memory = {"max_sequence_length": 3 * PAGE_SIZE, "kv_cache_memory": size}
    engine = EarlyExitEngine(model.segmented, max_batch_size=3, **memory)
    expected = [[t.token_id for t in generate(model, prompt, COUNT, None)] for prompt in PROMPTS]
    with drafting_in_turns() as drafted:
        # Another one shares its prefix, and all of them the batches.
        results = engine.generate([*PROMPTS, PROMPTS[-1]], AUTO)
        assert [one.token_ids for one in results] == [*expected, expected[-1]]
        params = [
            AUTO,
            SamplingParams(mode="early_exit", early_exit_threshold=1.0, max_tokens=COUNT),
        ]
        results = engine.generate(PROMPTS[-2:], params)
        assert [one.token_ids for one in results] == expected[-2:]
    assert drafted == {0, 1, 2}
    assert engine.pages.counts.preemptions > 0


def test_a_seed_gives_the_same_text_in_any_batch():
    model = mtp_model(2, noise=0.3, exits=(1, 3), use_exit_norm=True)
    params = [
        SamplingParams(mode="self_speculative", temperature=1.0, seed=seed, max_tokens=COUNT)
        for seed in range(len(PROMPTS))
    ]
    with drafting_in_turns() as drafted:
        together = EarlyExitEngine(model.segmented).generate(PROMPTS, params)
        for prompt, one, found in zip(PROMPTS, params, together, strict=True):
            (alone,) = EarlyExitEngine(model.segmented).generate([prompt], one)
            assert alone.token_ids == found.token_ids
    assert drafted == {0, 1, MTP}


def test_which_heads_may_draft():
    def heads(engine: EarlyExitEngine, **options: object) -> set[int]:
        params = SamplingParams(mode="self_speculative", **options)
        request = engine._requests.build(PROMPTS[0], params)
        assert request.sequence.exits == {one for one in request.mode.choice.heads if one != MTP}
        return set(request.mode.choice.heads)

    exits = EarlyExitEngine(make_model(exits=(1, 2, 3)).segmented)
    assert heads(exits) == heads(exits, draft_method="exit") == {0}
    assert heads(exits, draft_method="auto") == {0, 1, 2}
    assert heads(exits, draft_method="auto", draft_exit_layer=2) == {1}
    blocks = EarlyExitEngine(make_model(exits=(1, 2, 3), **HEADS["block"]).segmented)
    assert heads(blocks, draft_method="auto") == {0}
    assert heads(blocks, draft_method="auto", draft_exit_layer=2) == {1}
    both = EarlyExitEngine(mtp_model(2, exits=(1, 3), use_exit_norm=True).segmented)
    assert heads(both) == heads(both, draft_method="auto") == {0, 1, MTP}
    assert heads(both, draft_method="auto", draft_exit_layer=3) == {1, MTP}
    assert heads(both, draft_method="mtp") == {MTP}
    assert heads(both, draft_exit_layer=3) == {1}
    neither = EarlyExitEngine(make_model(exits=()).segmented)
    for method in ("auto", "exit"):
        with pytest.raises(FieldError, match="draft_"):
            heads(neither, draft_method=method)
