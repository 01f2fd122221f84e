"""Whatever pages are shared, given up or computed again, every token is the reference decoder's."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.model.page_store import PageStore
from tests.helpers.reference_decoder import ReferenceToken, generate
from tests.helpers.tiny_models import HEADS, LLAMA, TinyModel, make_model

EXITS = (1, 3)
TEXTS = {
    "one": [(7 * i * i + i) % 61 for i in range(46)],
    "other": [(7 * i * i + i) % 61 if i < 20 else (i * 5) % 61 for i in range(46)],
}


@cache
def model_of(heads: str) -> TinyModel:
    return make_model(LLAMA, exits=EXITS, **HEADS[heads])


@cache
def expected(
    heads: str,
    prompt: tuple[int, ...],
    threshold: float | None,
    exits: tuple[int, ...] | None,
    kv_policy: str,
) -> list[ReferenceToken]:
    propagates = kv_policy == "propagate"
    return generate(model_of(heads), prompt, 18, threshold, exits, propagates=propagates)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    # Few lengths, at and around the ends of pages, so that the reference is computed seldom.
    prompt = text[: draw(st.sampled_from([3, 15, 16, 17, 33, 46]))]
    count = draw(st.sampled_from([1, 6, 18]))
    match draw(st.sampled_from(["full", "early_exit", "self_speculative"])):
        case "early_exit":
            threshold = draw(st.sampled_from([0.0, 0.5]))
            exits = draw(st.sampled_from([None, (1,), (3,)]))
            params = SamplingParams(
                max_tokens=count,
                mode="early_exit",
                early_exit_threshold=threshold,
                exit_layers=exits,
                kv_policy=draw(st.sampled_from(["exact", "propagate"])),
            )
        case "self_speculative":
            params = SamplingParams(max_tokens=count, mode="self_speculative", draft_confidence=0.0)
        case _:
            params = SamplingParams(max_tokens=count)
    return prompt, params


def check(heads: str, prompt: list[int], params: SamplingParams, result) -> None:
    threshold = params.threshold if params.mode == "early_exit" else None
    reference = expected(heads, tuple(prompt), threshold, params.exit_layers, params.kv_policy)
    reference = reference[: params.max_tokens]
    assert result.token_ids == [token.token_id for token in reference]
    assert result.logprobs == pytest.approx([token.logprob for token in reference], abs=1e-3)
    if params.mode != "self_speculative":
        assert result.exit_layers == [token.exit_layer for token in reference]


@settings(max_examples=30)
@given(
    heads=st.sampled_from(["norm", "mlp", "block"]),
    rounds=st.lists(st.lists(requests(), min_size=1, max_size=6), min_size=1, max_size=3),
    memory=st.sampled_from([1.0, 1.4, 2.0, 9.0]),
    max_batch_size=st.sampled_from([1, 2, 5]),
    max_rows=st.sampled_from([7, 256]),
    max_pending=st.sampled_from([4, 64]),
)
def test_any_requests_with_any_memory(heads, rounds, memory, max_batch_size, max_rows, max_pending):
    model = model_of(heads).segmented
    one_sequence = sum(page_bytes(model)) * LLAMA.max_position_embeddings // 16
    engine = EarlyExitEngine(
        model,
        max_batch_size=max_batch_size,
        max_pending=max_pending,
        kv_cache_memory=int(memory * one_sequence),
    )
    engine.loop.scheduler.max_rows = max_rows
    for asked in rounds:
        prompts, params = zip(*asked, strict=True)
        for prompt, own, result in zip(
            prompts, params, engine.generate(prompts, params), strict=True
        ):
            check(heads, prompt, own, result)
        assert engine.pages.bytes_held == 0
        assert len(engine.loop._store) == engine.pages.num_stored


def test_the_youngest_gives_way_and_its_text_does_not_change():
    """Sampled texts, too: what has been drawn is not drawn again."""
    model = model_of("block").segmented
    one_sequence = sum(page_bytes(model)) * LLAMA.max_position_embeddings // 16
    prompts = [TEXTS["one"][i : i + 15] for i in range(4)]
    params = [
        SamplingParams(max_tokens=40, mode="self_speculative", temperature=1.0, seed=1),
        SamplingParams(
            max_tokens=40, mode="early_exit", early_exit_threshold=0.5, temperature=1.0, seed=2
        ),
        SamplingParams(max_tokens=40, temperature=1.0, seed=3),
        SamplingParams(max_tokens=40, mode="self_speculative", temperature=1.0, seed=4),
    ]
    scarce = EarlyExitEngine(model, kv_cache_memory=int(1.6 * one_sequence), prefix_caching=False)
    ample = EarlyExitEngine(model)
    together = scarce.generate(prompts, params)
    assert scarce.pages.counts.preemptions > 2
    for prompt, own, result in zip(prompts, params, together, strict=True):
        (alone,) = ample.generate([prompt], own)
        assert (result.token_ids, result.exit_layers) == (alone.token_ids, alone.exit_layers)


def test_what_requests_begin_with_is_computed_once():
    model = model_of("norm").segmented
    engine = EarlyExitEngine(model)
    rows = []
    run = model.segments[0].__class__.__call__

    def counted(segment, hidden, this):
        if segment is model.segments[0] or segment.attentions.start == 0:
            rows.append(len(hidden))
        return run(segment, hidden, this)

    prompt = TEXTS["one"][:33]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.segments[0].__class__, "__call__", counted)
        # The first one computes the prompt, and the others wait for that.
        results = engine.generate([prompt] * 4, SamplingParams(max_tokens=1))
        assert sum(rows) == 33 + 3 * 1
        later = engine.generate([prompt[:16] + [5] * 3], SamplingParams(max_tokens=1))
        assert sum(rows) == 33 + 3 * 1 + 3
    cached = [one.statistics.num_cached_tokens for one in results + later]
    assert cached == [0, 32, 32, 32, 16]
    plain = EarlyExitEngine(model, prefix_caching=False)
    plain.generate([prompt] * 2, SamplingParams(max_tokens=1))
    assert plain.pages.counts.cached_tokens == 0
    assert plain.pages.num_stored == 0


def test_a_page_that_finds_no_memory_costs_nothing_but_itself(monkeypatch):
    engine = EarlyExitEngine(model_of("norm").segmented)
    params = SamplingParams(max_tokens=6)
    (expected,) = engine.generate([TEXTS["one"]], params)
    assert engine.pages.num_stored > 1
    save = PageStore.save

    def failing(store, number, *args):
        if number % 2:
            raise torch.OutOfMemoryError
        save(store, number, *args)

    monkeypatch.setattr(PageStore, "save", failing)
    prompts = [[5, *TEXTS["one"][1:]], TEXTS["one"]]
    _, again = engine.generate(prompts, params)
    assert again.token_ids == expected.token_ids
    assert engine.pages.num_stored == len(engine.loop._store)
    assert engine.pages.bytes_stored == sum(
        engine.pages._to_depth[page.depth] for page in engine.pages._tree._by_use.values()
    )
    monkeypatch.undo()
    assert [one.token_ids for one in engine.generate(prompts, params)][1] == expected.token_ids


def test_pages_of_a_failed_request_are_not_kept():
    model = make_model(LLAMA, exits=EXITS)
    model.weights["decoder.layers.3.mlp.linear_fc2.weight"][0, 0] = float("nan")
    engine = EarlyExitEngine(model.segmented)
    (result,) = engine.generate([TEXTS["one"]], SamplingParams(max_tokens=3))
    assert result.finish_reason == "error"
    assert engine.pages.num_stored == 0
    assert engine.pages.bytes_held == 0
