"""Requests of every kind that arrive, end and are cancelled: drawn by Hypothesis, checked with the
reference decoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from tests.helpers.reference_decoder import ReferenceToken, generate, scores
from tests.helpers.tiny_models import LLAMA, TinyModel

CONTEXT = 24
"""Most tokens of a sequence."""
THRESHOLDS = (0.0, 0.3, 0.6, 0.9, 1.0)


class Syllables:
    """A tokenizer with so few letters that stop strings occur; token 0 ends a document."""

    vocab_size = LLAMA.vocab_size
    eod_id = 0
    other_end_ids = ()

    def decode(self, token_ids: list[int]) -> str:
        return "".join(("a", "b", "c", "ab", "ca")[token % 5] for token in token_ids if token)

    def token_bytes(self, token_id: int) -> bytes | None:
        return None if token_id else b""


@dataclass(frozen=True)
class Arrival:
    """A request, with the engine's steps at which it is submitted and cancelled."""

    prompt: list[int]
    params: SamplingParams
    time: int
    given_up: int | None
    """The step at which it is cancelled, if it has not ended by then."""


stop_strings = st.text("abc", min_size=1, max_size=3)


@st.composite
def exit_rules(draw: st.DrawFn) -> dict[str, Any]:
    """Draw when to leave a model with exits behind its layers 1 and 3."""
    layers = draw(st.sampled_from([None, (1,), (3,), (1, 3)]))
    measure = draw(st.sampled_from([None, None, "margin", "entropy", "similarity"]))
    thresholds = st.sampled_from(THRESHOLDS if measure is None else (0.0, 0.2, 0.4, 0.7, 0.95))
    fields: dict[str, Any] = {"exit_layers": layers, "exit_measure": measure}
    fields["exit_threshold_decay"] = draw(st.sampled_from([0.0, 0.0, 4.0]))
    fields["kv_policy"] = draw(st.sampled_from(["exact", "propagate"]))
    fields["exits_pay_at"] = draw(st.sampled_from([0, 0, 1, 8]))
    if draw(st.booleans()):
        count = 2 if layers is None else len(layers)
        fields["exit_thresholds"] = tuple(draw(thresholds) for _ in range(count))
    else:
        fields["early_exit_threshold"] = draw(thresholds)
    return fields


def rule_of(params: SamplingParams) -> dict[str, Any]:
    """The same in the words of the reference decoder, but for pauses."""
    if params.mode != "early_exit":
        return {"threshold": None}
    thresholds = params.exit_thresholds
    return {
        "threshold": params.threshold if thresholds is None else thresholds,
        "exit_layers": params.exit_layers,
        "measure": params.exit_measure or "max_probability",
        "decay": params.exit_threshold_decay,
        "propagates": params.kv_policy == "propagate",
    }


@st.composite
def sampling_params(draw: st.DrawFn, methods: tuple[str | None, ...]) -> SamplingParams:
    """Draw greedy parameters, in every mode, with every kind of stop, and some of the methods to
    draft."""
    mode = draw(st.sampled_from(["full", "early_exit", "self_speculative"]))
    fields: dict[str, Any] = {}
    if mode == "early_exit":
        fields = draw(exit_rules())
    if mode == "self_speculative":
        method = draw(st.sampled_from(methods))
        layers = [None] if method == "mtp" else [None, 1, 3]
        fields = {
            "draft_method": method,
            "draft_exit_layer": draw(st.sampled_from(layers)),
            "num_draft_tokens": draw(st.integers(1, 6)),
            "draft_confidence": draw(st.sampled_from([0.0, 0.3, 0.8, None])),
        }
    most = draw(st.integers(1, 14))
    stops = draw(st.sampled_from([(), (), tuple(range(5, 61, 7)), tuple(range(2, 61, 5))]))
    return SamplingParams(
        mode=mode,
        max_tokens=most,
        min_tokens=draw(st.just(0) | st.integers(0, most)),
        stop=draw(st.just([]) | st.lists(stop_strings, min_size=1, max_size=2)),
        stop_token_ids=stops,
        ignore_eos=draw(st.booleans()),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        **fields,
    )


@st.composite
def arrivals(
    draw: st.DrawFn, methods: tuple[str | None, ...] = (None, "exit", "auto")
) -> list[Arrival]:
    """Draw some requests in the order of their arrival, for a model with exits behind its layers 1
    and 3, and with what may draft by these methods."""
    drawn, time = [], 0
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(0, LLAMA.vocab_size - 1), min_size=1, max_size=12))
        given_up = draw(st.none() | st.none() | st.integers(0, 12))
        end = None if given_up is None else time + given_up
        drawn.append(Arrival(prompt, draw(sampling_params(methods)), time, end))
        time += draw(st.integers(0, 3))
    return drawn


def play(engine: EarlyExitEngine, drawn: list[Arrival]) -> list[GenerationResult]:
    """Submit and cancel the requests, and step the engine until all have ended."""
    requests = []
    for now in count():
        for arrival in drawn[len(requests) :]:
            if arrival.time == now:
                requests.append(engine.submit(arrival.prompt, arrival.params))
        for arrival, request in zip(drawn, requests, strict=False):
            if arrival.given_up == now:
                engine.cancel(request)
        if len(requests) == len(drawn) and all(request.is_finished for request in requests):
            break
        engine.step()
    return [request.result() for request in requests]


def assert_oracles(model: TinyModel, arrival: Arrival, *results: GenerationResult) -> None:
    """Check that each request has the reference decoder's tokens up to its end, or to where it was
    cancelled."""
    params = arrival.params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {Syllables.eod_id})
    tokens = generate(
        model,
        arrival.prompt,
        min(params.max_tokens, CONTEXT - len(arrival.prompt)),
        forbidden=stops,
        num_forbidden=params.min_tokens,
        most_tokens=params.max_tokens,
        pays_at=params.exits_pay_at,
        **rule_of(params),
    )
    tokens, text, end = until_the_end(tokens, params, stops)
    expected = None
    if params.prompt_logprobs is not None:
        expected = scores(model, arrival.prompt, **rule_of(params))
    for result in results:
        assert_agrees(arrival, result, tokens, text, end)
        found = result.prompt_tokens
        if found is None:
            assert expected is None or result.finish_reason == "cancelled"
            continue
        assert expected is not None
        assert [token.token_id for token in found] == arrival.prompt
        assert [t.exit_layer for t in found] == [None, *(token.exit_layer for token in expected)]
        logprobs = [token.logprob for token in expected]
        assert [token.logprob for token in found[1:]] == pytest.approx(logprobs, abs=3e-4)
        confidences = [token.confidence for token in expected]
        told = [token.confidence for token in found[1:]]
        assert told == pytest.approx(confidences, rel=3e-4, abs=2e-5)


def assert_agrees(
    arrival: Arrival,
    result: GenerationResult,
    tokens: list[ReferenceToken],
    text: str,
    end: tuple[str, str | int | None],
) -> None:
    """Check that the result is the expected one, or the beginning of it if the request was
    cancelled."""
    if result.finish_reason == "cancelled":
        assert arrival.given_up is not None
        assert len(result.token_ids) < len(tokens)
        assert text.startswith(result.text)
        tokens = tokens[: len(result.token_ids)]
    else:
        assert (result.text, result.finish_reason, result.stop_reason) == (text, *end)
    assert result.token_ids == [token.token_id for token in tokens]
    if arrival.params.mode != "self_speculative":
        assert result.exit_layers == [token.exit_layer for token in tokens]
    assert result.logprobs == pytest.approx([token.logprob for token in tokens], abs=3e-4)
    confidences = [token.confidence for token in tokens]
    assert result.confidences == pytest.approx(confidences, rel=3e-4, abs=2e-5)


def until_the_end(
    tokens: list[ReferenceToken], params: SamplingParams, stops: set[int]
) -> tuple[list[ReferenceToken], str, tuple[str, str | int | None]]:
    """The tokens up to the one that ends the sequence, their text, and the reasons, found letter by
    letter."""
    text = ""
    for number, token in enumerate(tokens, start=1):
        may_stop, token_id = number > params.min_tokens, token.token_id
        if may_stop and token_id in stops:
            why = token_id if token_id in params.stop_token_ids else None
            return tokens[:number], text, ("stop", why)
        for letter in Syllables().decode([token_id]):
            text += letter
            ending = [stop for stop in params.stop if text.endswith(stop)]
            if may_stop and ending:
                longest = max(ending, key=len)
                return tokens[:number], text.removesuffix(longest), ("stop", longest)
    return tokens, text, ("length", None)


@cache
def examples(
    number: int, methods: tuple[str | None, ...] = (None, "exit", "auto")
) -> list[list[Arrival]]:
    """Examples for tests that Hypothesis itself cannot run; they are the same in every run of the
    tests. For `methods` see `arrivals`."""
    collected = []

    @settings(max_examples=number, phases=[Phase.generate])
    @given(arrivals(methods))
    def collect(drawn: list[Arrival]) -> None:
        collected.append(drawn)

    collect()
    return collected
