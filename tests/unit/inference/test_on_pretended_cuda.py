"""The engine on a device that is not the host: no mixed devices, and no more kernels and waits than
a step needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.transfer import upload_to
from tests.helpers.mtp_models import mtp_model
from tests.helpers.pretended_cuda import (
    CudaTensor,
    PretendedCuda,
    PretendedRecorder,
    pretended_engine,
    pretended_recorder,
)
from tests.helpers.reference_decoder import generate
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, LLAMA, make_model

PROMPTS = [[5, 17, 3, 44, 8], [7], [9, 9, 2], list(range(1, 20)), [4, 4], [3], [8, 1]]
EVERYTHING: dict[str, Any] = {
    "temperature": 1.1,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
    "min_tokens": 60,
    "stop_token_ids": (1, 2),
    "logprobs": 3,
}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "early_exit": {"early_exit_threshold": 0.4},
    "self_speculative": {},
}


@pytest.fixture
def cuda() -> Iterator[PretendedCuda]:
    with PretendedCuda() as mode:
        yield mode
    assert mode.mixed == []


def sampled(mode: str, seed: int, **fields: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "max_tokens": 8} | fields | MODES[mode]
    return SamplingParams(mode=mode, seed=seed, **fields)


def requests() -> list[SamplingParams]:
    """One for each prompt: greedy and sampled ones of all modes."""
    return [
        SamplingParams(max_tokens=8, exit_details=True, logprobs=2),
        SamplingParams(max_tokens=8, mode="early_exit", early_exit_threshold=0.5),
        SamplingParams(max_tokens=8, mode="self_speculative", prompt_logprobs=2),
        sampled("early_exit", 3, **EVERYTHING | {"min_tokens": 2, "exit_details": True}),
        sampled("self_speculative", 4, min_tokens=3, stop_token_ids=(1, 2, 3), logprobs=1),
        sampled("early_exit", 5, exit_measure="similarity", exit_threshold_decay=4.0),
        SamplingParams(
            max_tokens=8, mode="early_exit", exit_measure="entropy", exit_thresholds=(0.4, 0.2)
        ),
    ]


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("llama", "all"),
        ("gpt2", "block"),
        ("nemotron", "mlp"),
        ("llama", "projection"),
        ("llama", "few answers"),
        ("qwen", "untied"),
    ],
)
def test_results_are_those_of_the_cpu(cuda, architecture, heads):
    model = make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])
    found = pretended_engine(model, max_batch_size=4).generate(PROMPTS, requests())
    engine = EarlyExitEngine(model.segmented, max_batch_size=4)
    for one, expected in zip(found, engine.generate(PROMPTS, requests()), strict=True):
        assert one.token_ids == expected.token_ids
        assert one.exit_layers == expected.exit_layers
        assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert one.confidences == pytest.approx(expected.confidences, abs=1e-5)
        for best, other in zip(one.top_logprobs, expected.top_logprobs, strict=True):
            assert [token for token, _ in best] == [token for token, _ in other]
            assert [value for _, value in best] == pytest.approx([v for _, v in other], abs=1e-5)
    for prompt, one, threshold in zip(PROMPTS, found, (None, 0.5, None), strict=False):
        tokens = generate(model, prompt, 8, threshold)
        assert one.token_ids == [token.token_id for token in tokens]


@pytest.fixture
def recorder(cuda) -> Iterator[PretendedRecorder]:
    with pretended_recorder(cuda) as recorder:
        yield recorder


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("llama", "all"),
        ("gpt2", "block"),
        ("nemotron", "mlp"),
        ("odd ones", "mlp"),
        ("qwen", "untied"),
        ("gpt2", "norm"),
        ("llama", "few answers"),
    ],
)
def test_captured_steps(cuda, recorder, architecture, heads):
    """As plain ones, in one launch for a stretch of layers or a head; nothing is captured on the
    way."""
    model = make_model(ARCHITECTURES[architecture], exits=(1, 3), **HEADS[heads])
    engine = pretended_engine(model, True, max_batch_size=4)
    captured = recorder.count
    found = engine.generate(PROMPTS, requests())
    assert recorder.count == captured
    assert cuda.launches["replay"] > 0
    plain = pretended_engine(model, max_batch_size=4).generate(PROMPTS, requests())
    for one, other in zip(found, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.exit_layers == other.exit_layers
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-4)


@pytest.mark.parametrize("is_captured", [False, True])
def test_drafts_of_a_multi_token_prediction_module(cuda, is_captured):
    with pretended_recorder(cuda) if is_captured else nullcontext():
        model = mtp_model(2, noise=0.2, memory=0.03, exits=(1, 3), use_exit_norm=True)
        drafting = {"mode": "self_speculative", "draft_method": "mtp", "max_tokens": 12}
        params = [
            SamplingParams(**drafting, draft_confidence=1e-9),
            SamplingParams(**drafting, temperature=0.8, seed=3),
            SamplingParams(mode="self_speculative", max_tokens=12),
        ]
        prompts = [[1, 2, 3], [4, 5], [6] * 9]
        found = pretended_engine(model, is_captured, max_batch_size=4).generate(prompts, params)
    expected = EarlyExitEngine(model.segmented, max_batch_size=4).generate(prompts, params)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.token_ids == other.token_ids
        # Of a greedy text, which of them drafts depends on what drafts cost on a device.
        assert number == 2 or one.exit_layers == other.exit_layers
    assert found[0].statistics.drafts == expected[0].statistics.drafts
    assert found[0].statistics.drafts.mtp_accepted > 0


def steady(
    cuda: PretendedCuda,
    params: list[SamplingParams],
    heads: str = "norm",
    steps: int = 8,
    is_captured: bool = False,
) -> tuple[float, float]:
    """Kernels and waits of a step in which each request has a row."""
    model = make_model(exits=(1, 3), **HEADS[heads])
    engine = pretended_engine(model, is_captured, max_batch_size=len(params))
    for number, one in enumerate(params):
        engine.submit([1 + number] * 3, one)
    for _ in range(3):
        engine.step()
    cuda.reset()
    for _ in range(steps):
        engine.step()
    assert not any(request.is_finished for request in engine.loop.requests.values())
    return cuda.launches.total() / steps, cuda.waits.total() / steps


@pytest.mark.parametrize("heads", ["norm", "untied", "block"])
@pytest.mark.parametrize(("rows", "budget"), [(1, 7), (3, 8), (8, 8)])
def test_a_captured_step_is_few_launches(cuda, recorder, rows, budget, heads):
    """Tokens and places go to the device, all layers are replayed, and so is the head; the results
    of both are copied. With several rows, their places are also uploaded for other segments."""
    params = [sampled("full", seed, temperature=0.0, max_tokens=60) for seed in range(rows)]
    launches, waits = steady(cuda, params, heads, is_captured=True)
    assert launches <= budget, cuda.launches
    assert cuda.launches["replay"] == 2 * 8
    assert waits == 1


@pytest.mark.parametrize("heads", ["norm", "untied"])
@pytest.mark.parametrize(
    ("mode", "rows", "budget"),
    [
        ("early_exit", 1, 10),
        ("early_exit", 8, 15),
        ("self_speculative", 1, 8),
        ("self_speculative", 8, 13),
    ],
)
def test_a_captured_step_with_exits_is_few_launches(cuda, recorder, mode, rows, budget, heads):
    """Some steps have two stretches of layers, up to an exit and behind it, and ask two heads."""
    # Without pauses, which sequences do not make together.
    own = {"draft_confidence": 0.2} if mode == "self_speculative" else {}
    own |= {"temperature": 0.0, "max_tokens": 60}
    params = [sampled(mode, seed, **own) for seed in range(rows)]
    launches, waits = steady(cuda, params, heads, is_captured=True)
    assert launches <= budget, cuda.launches
    assert 1 < cuda.launches["replay"] / 8 < 4
    assert waits <= 1


@pytest.mark.parametrize("heads", ["norm", "untied"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [None, {}, EVERYTHING], ids=["greedy", "plain", "everything"])
def test_a_step_waits_once(cuda, mode, fields, heads):
    own = {"temperature": 0.0} if fields is None else fields
    params = [sampled(mode, seed, **own | {"max_tokens": 60}) for seed in range(3)]
    _, waits = steady(cuda, params, heads)
    # Where an exit is unlikely to be needed, it is asked only when it is known to be.
    assert 0 < waits <= (1.5 if mode == "early_exit" else 1), cuda.waits


@pytest.mark.parametrize("is_captured", [False, True])
def test_other_measures_wait_no_longer(cuda, recorder, is_captured):
    measures = ("margin", "entropy", "similarity", "max_probability")
    params = [
        sampled("early_exit", seed, temperature=0.0, max_tokens=60, exit_measure=measure)
        for seed, measure in enumerate(measures)
    ]
    _, waits = steady(cuda, params, is_captured=is_captured)
    assert 0 < waits <= 1.5, cuda.waits


def test_gates_take_one_more_wait(cuda):
    """All gates of a step are read together, before the heads; those of several heads together."""
    model = make_model(exits=(1, 2, 3), use_exit_norm=True, use_exit_gate=True)
    params = [
        SamplingParams(
            mode="early_exit",
            exit_measure=measure,
            early_exit_threshold=threshold,
            max_tokens=8,
            exit_details=details,
            seed=1,
            temperature=temperature,
        )
        for measure, threshold, details, temperature in (
            ("gate", 0.5, False, 0.0),
            ("gate", 0.6, False, 1.0),
            ("gate", 0.5, True, 0.0),
            ("max_probability", 0.4, False, 1.0),
            ("gate", 1.0, False, 0.0),
        )
    ]
    engine = pretended_engine(model, max_batch_size=5)
    prompts = PROMPTS[: len(params)]
    found = engine.generate(prompts, params)
    expected = EarlyExitEngine(model.segmented, max_batch_size=5).generate(prompts, params)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.exit_layers) == (other.token_ids, other.exit_layers)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-5)
    assert len({layer for one in found for layer in one.exit_layers}) > 2
    requests = [engine.submit(prompt, params[0]) for prompt in PROMPTS[:3]]
    while not all(request.sequence.generated for request in requests):
        engine.step()
    steps = 0
    cuda.reset()
    while not any(request.is_finished for request in requests):
        engine.step()
        steps += 1
    assert steps < cuda.waits.total() <= 2 * steps, cuda.waits


@pytest.mark.parametrize(
    ("fields", "budget"), [({}, 14), ({"temperature": 0.7, "top_p": 0.9}, 26), (EVERYTHING, 56)]
)
def test_sampling_launches_as_many_kernels_for_many_rows_as_for_few(cuda, fields, budget):
    def params(count: int, **own: Any) -> list[SamplingParams]:
        return [sampled("full", seed, **own | {"max_tokens": 60}) for seed in range(count)]

    greedy = [steady(cuda, params(count, temperature=0.0))[0] for count in (2, 7)]
    launches = [steady(cuda, params(count, **fields))[0] for count in (2, 7)]
    extra = [one - base for one, base in zip(launches, greedy, strict=True)]
    assert extra[0] == extra[1] <= budget, cuda.launches
    assert greedy[0] == greedy[1] <= 72


@pytest.mark.parametrize(("mode", "budget"), [("early_exit", 22), ("self_speculative", 17)])
def test_half_layers_at_exits_are_captured(cuda, recorder, mode, budget):
    """With MLPs of their own, exits divide layers. Those of several heads that are asked together
    are launched one by one."""
    params = [sampled(mode, seed, temperature=0.0, max_tokens=60) for seed in range(8)]
    launches, _ = steady(cuda, params, "mlp", is_captured=True)
    assert launches <= budget, cuda.launches
    assert not any("attention" in name for name in cuda.launches)


def test_a_large_nucleus_takes_one_more_wait(cuda):
    model = make_model(replace(LLAMA, vocab_size=700))
    wide = sampled("full", 1, temperature=90.0, top_p=0.99, max_tokens=20)
    params = [wide, sampled("full", 2, temperature=0.1, top_p=0.5, max_tokens=20)]
    engine = pretended_engine(model, max_batch_size=2)
    cuda.reset()
    found = engine.generate(PROMPTS[:2], params)
    expected = EarlyExitEngine(model.segmented).generate(PROMPTS[:2], params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert 20 < cuda.waits.total() <= 2 * 20, cuda.waits


def test_mixed_devices_and_waits_are_found():
    with PretendedCuda() as mode:
        here = torch.ones(2)
        # Not by a factory: other tests have prepared this process for training without a GPU.
        there = here.to("cuda")
        mode.waits.clear()
        assert (there.device.type, (there + 1).device.type, here.device.type) == (
            "cuda",
            "cuda",
            "cpu",
        )
        assert isinstance(there.view(2, 1).sum(), CudaTensor)
        launches = dict(mode.launches)
        assert not mode.waits
        for wait in (
            there.tolist,
            lambda: bool((there > 0).all()),
            lambda: there[there > 0],
            lambda: here.to("cuda"),
            lambda: there.cpu() + here,
            there.nonzero,
        ):
            mode.waits.clear()
            wait()
            assert mode.waits.total() == 1
        mode.waits.clear()
        here.pin_memory().to("cuda", non_blocking=True)
        assert not mode.waits
        upload_to([1, 2], there)
        assert there.tolist() == [1, 2]
        assert [name for name, _ in mode.waits] == ["tolist"]
        there.copy_(here.pin_memory())
        there.copy_(here, non_blocking=True)
        assert mode.waits.total() == 3
        with pytest.raises(RuntimeError, match="different devices: add"):
            there.add(here)
    assert launches == {"copy between devices": 1, "add": 1, "sum": 1}
    assert len(mode.mixed) == 1
