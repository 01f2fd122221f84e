"""Exits that do not pay end soon, exits that pay go on, and a text depends on nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.modes import pauses
from megatron.early_exit.inference.modes.exit_gain import ExitCosts, ExitGain
from tests.helpers.reference_decoder import generate
from tests.helpers.reference_pauses import SHORT_PAUSES
from tests.helpers.tiny_models import HEADS, LLAMA, TinyModel, make_model

COSTS = ExitCosts((50.0, 50.0), head=20.0, exit_head=20.0, held=0.1, rows=16.0, step=2.0)
PROMPTS = [[5, 17, 3], [1, 2, 3, 4], [9]]
LONG = replace(LLAMA, max_position_embeddings=512)


def decode(
    rate: float, company: int, num_tokens: int = 4000, seed: int = 0, **options: Any
) -> tuple[float, int]:
    """Steps of the full model that each token takes, by the account, and tokens without exits; of
    an exit that gives tokens at a rate."""
    rng, gain = random.Random(seed), ExitGain(COSTS, (0,), company, **options)
    given, time, unasked = 0, 0.0, 0
    while given < num_tokens:
        segment = int(rng.random() >= rate)
        time += gain._time(segment) / gain._full_time
        pause = gain.add(segment)
        given, time, unasked = given + 1 + pause, time + pause, unasked + pause
    return time / given, unasked


@pytest.mark.parametrize("company", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("options", [{}, {"is_gated": True}, {"is_held": True}])
def test_exits_that_hardly_give_a_token_cost_two_percent_at_most(company, rate, options):
    spent, unasked = decode(rate, company, num_tokens=400, **options)
    assert spent <= 1.02
    assert unasked >= 150 or spent < 1.01


def test_exits_that_pay_go_on():
    assert decode(0.9, 1) == (pytest.approx(0.67, abs=0.02), 0)
    # Gates are asked for nothing.
    assert decode(0.25, 1, is_gated=True)[1] == 0
    assert decode(0.25, 1)[1] > 3000


def test_in_a_batch_only_held_positions_save_arithmetic():
    exact, held = decode(0.8, 16), decode(0.8, 16, is_held=True)
    assert exact[1] > 3000
    assert held == (pytest.approx(0.95, abs=0.02), 0)


def test_times_of_one_token_alone():
    full = 2 + 120 * (1 + 1 / 16)
    for options, expected in (
        # In front of the exit and its head; what is behind is owed.
        ({}, 2 + 70 * (1 + 1 / 16) + 50 / 16),
        ({"is_held": True}, 2 + 70 * (1 + 1 / 16) + 5 / 16),
        ({"is_gated": True}, 2 + 70 * (1 + 1 / 16) + 50 / 16),
    ):
        gain = ExitGain(COSTS, (0,), 1, **options)
        assert gain._full_time == pytest.approx(full)
        assert gain._time(0) == pytest.approx(expected)
        # Refused: the question, and another step.
        asked = 0 if "is_gated" in options else 20 * (1 + 1 / 16)
        assert gain._time(1) == pytest.approx(full + asked + 2)
    assert ExitGain(COSTS, (), 1)._time(1) == pytest.approx(full)


def test_costs_of_a_model():
    costs = Costs((10.0, 20.0), head=7.0, exit_head=5.0, rows=9.0, held=0.2, step=0.1)
    assert costs.of_exits(block=4.0) == ExitCosts((10, 20), 7, 9, 0.2, 9, 3)


def params(threshold: float, **others: Any) -> SamplingParams:
    return SamplingParams(mode="early_exit", early_exit_threshold=threshold, **others)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short text of a model with few words has several of them."""
    for name, value in SHORT_PAUSES.items():
        monkeypatch.setattr(pauses, name, value)


def check(model: TinyModel, prompt: list[int], wanted: SamplingParams, result: Any) -> None:
    """A result is what the oracle gives."""
    expected = generate(
        model,
        prompt,
        wanted.max_tokens,
        wanted.threshold,
        measure=wanted.exit_measure or "max_probability",
        propagates=wanted.kv_policy == "propagate",
        pays_at=wanted.exits_pay_at,
    )
    assert result.token_ids == [token.token_id for token in expected]
    assert result.exit_layers == [token.exit_layer for token in expected]
    assert result.confidences == pytest.approx([t.confidence for t in expected], rel=2e-4)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("kind", "kv_policy", "measure"),
    [
        ("norm", "exact", "max_probability"),
        ("norm", "exact", "gate"),
        ("norm", "propagate", "similarity"),
        ("block", "propagate", "max_probability"),
        ("block", "propagate", "gate"),
    ],
)
def test_tokens_are_the_oracles_in_whatever_company(kind, kv_policy, measure):
    model = make_model(exits=(1, 3), **HEADS[kind], use_exit_gate=True)
    engine = EarlyExitEngine(model.segmented, max_pending=3)
    plain = {"exit_measure": measure, "kv_policy": kv_policy, "max_tokens": 15}
    paused = asked = 0
    for threshold in (0.6, 0.9):
        wanted = [params(threshold, exits_pay_at=company, **plain) for company in (1, 8, 32)]
        together = engine.generate(PROMPTS, wanted)
        for prompt, one, result in zip(PROMPTS, wanted, together, strict=True):
            check(model, prompt, one, result)
            unasked = result.statistics.num_unasked_tokens
            paused += unasked
            asked += len(result.token_ids) - unasked
    assert paused > 20
    assert asked > 20


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("measure", ["max_probability", "gate"])
def test_details_are_told_in_pauses_and_change_nothing(measure):
    model = make_model(exits=(1, 3), use_exit_norm=True, use_exit_gate=True)
    engine = EarlyExitEngine(model.segmented)
    wanted = params(0.7, exits_pay_at=32, max_tokens=40, exit_measure=measure)
    (plain,) = engine.generate(PROMPTS[:1], wanted)
    (told,) = engine.generate(PROMPTS[:1], replace(wanted, exit_details=True))
    assert told.token_ids == plain.token_ids
    assert told.statistics.num_unasked_tokens == plain.statistics.num_unasked_tokens > 5
    would_leave = [
        any(report.confidence >= 0.7 for report in heads[:-1]) and layer == 4
        for heads, layer in zip(told.heads, told.exit_layers, strict=True)
    ]
    assert any(would_leave), "an exit is not to be heard in a pause"
    for heads, layer in zip(told.heads, told.exit_layers, strict=True):
        layers = [report.layer for report in heads]
        assert layers == [one for one in (1, 3, 4) if one <= layers[-1]]
        assert layer in layers


def test_exits_that_never_give_a_token_are_left_out():
    model = make_model(LONG, exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    request = engine.submit(PROMPTS[0], params(1.0, exits_pay_at=1, max_tokens=200))
    asked = []
    while not request.is_finished:
        asking = request.sequence.is_asking
        before = request.sequence.num_answers
        engine.step()
        asked.append((asking, request.sequence.num_answers > before))
    assert not any(is_asked for asking, is_asked in asked if not asking)
    assert any(is_asked for _, is_asked in asked)
    (full,) = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=200))
    result = request.result()
    assert result.token_ids == full.token_ids
    assert 150 <= result.statistics.num_unasked_tokens < 197
    assert full.statistics.num_unasked_tokens == 0


def test_prompts_are_scored_with_all_exits_also_in_a_pause():
    model = make_model(exits=(1, 3), use_exit_norm=True)
    engine = EarlyExitEngine(model.segmented)
    plain = params(0.3, max_tokens=0, prompt_logprobs=0)
    found = [
        engine.generate([[7] * 20], one)[0] for one in (plain, replace(plain, exits_pay_at=32))
    ]
    assert found[0].prompt_tokens == found[1].prompt_tokens
