"""Drafts that do not pay end soon, and drafts that pay go on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.modes.draft_gain import DraftCosts, DraftGain
from megatron.early_exit.inference.modes.pauses import (
    CREDIT,
    LONGEST_PAUSE,
    MOST_LOST,
    SHORTEST_PAUSE,
)
from tests.helpers.tiny_models import HEADS, LLAMA, make_model

COSTS = DraftCosts(ask=40.0, verify=70.0, full=100.0, rows=16.0, step=2.0)
MODEL = make_model(exits=(1, 3), use_exit_norm=True)


def seconds(weights: float, rows: int, company: int) -> float:
    """Of one of `company` sequences: reading is shared, and each row is computed."""
    return 2 / company + weights / company + weights * rows / 16


@pytest.mark.parametrize("company", [1, 4, 16])
def test_costs_are_shares_of_a_step_of_the_full_model(company):
    full = seconds(100, 1, company)
    assert COSTS.of_question(company) == pytest.approx(seconds(40, 1, company) / full)
    for drafts in (0, 3):
        expected = seconds(70, drafts + 1, company) / full
        assert COSTS.of_verification(drafts, company) == pytest.approx(expected)


def test_costs_of_a_model():
    costs = Costs((10.0, 20.0, 30.0), head=7.0, exit_head=5.0, rows=9.0, step=0.1)
    expected = DraftCosts(ask=10 + 20 + 4 + 5, verify=30 + 7, full=67, rows=9, step=6)
    assert costs.of_drafts(1, block=4.0) == expected


@dataclass
class Exit:
    """An exit of a pretended model: how sure it is, and how often it is right."""

    confidences: tuple[float, ...]
    accuracy: float


def decode(exit_: Exit, num_tokens: int, company: int = 1, seed: int = 0) -> tuple[float, int]:
    """Steps of the full model that some tokens take, and how many of them had no drafts."""
    rng, gain = random.Random(seed), DraftGain(COSTS)
    given, steps, undrafted = 0, 0.0, 0
    while given < num_tokens:
        least, likelihood, asked = gain.least_likelihood(company), 1.0, 0
        drafts: list[float] = []
        while len(drafts) < 4:
            confidence = rng.choice(exit_.confidences)
            likelihood *= min(confidence * gain.trust, 1)
            asked += 1
            if likelihood < least:
                break
            drafts.append(confidence)
        accepted = 0
        while accepted < len(drafts) and rng.random() < exit_.accuracy:
            accepted += 1
        steps += asked * COSTS.of_question(company) + COSTS.of_verification(len(drafts), company)
        given += accepted + 1
        pause = gain.add(asked, drafts, accepted, company)
        given, steps, undrafted = given + pause, steps + pause, undrafted + pause
    return steps / given, undrafted


@pytest.mark.parametrize("company", [1, 8, 32])
@pytest.mark.parametrize("accuracy", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("confidences", [(0.1, 0.3), (0.9, 0.95), (1.0,)])
def test_useless_drafts_cost_two_percent_at_most(company, accuracy, confidences):
    spent, undrafted = decode(Exit(confidences, accuracy), 400, company)
    assert spent <= 1.02
    assert undrafted > 200 or spent < 1.0


def test_good_drafts_hardly_ever_pause():
    for confidence in (0.95, 0.6):
        found = [decode(Exit((confidence,), 0.9), 400, seed=seed)[1] for seed in range(40)]
        assert sum(one > 0 for one in found) <= 2
    # Five tokens take about four questions and a verification of five rows.
    best = (4 * COSTS.of_question() + COSTS.of_verification(4)) / (1 + 0.95 * 3.71)
    spent, _ = decode(Exit((0.95,), 0.95), 2000)
    assert spent < 1.05 * best


def test_what_is_lost_before_a_pause_is_bounded():
    gain, lost, pauses = DraftGain(COSTS), -CREDIT, []
    for _ in range(60):
        lost += COSTS.of_question() * 2 + COSTS.of_verification(1) - 1
        pause = gain.add(2, [0.9], 0)
        if pause:
            assert MOST_LOST <= lost < MOST_LOST + 1
            pauses.append(pause)
            lost = 0.0
    assert pauses[:3] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 4 * SHORTEST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_after_drafts_that_pay_the_next_pause_is_short_again():
    gain = DraftGain(COSTS)

    def lose() -> int:
        while not (pause := gain.add(2, [0.9], 0)):
            pass
        return pause

    assert [lose(), lose()] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE]
    for _ in range(9):
        assert gain.add(4, [0.9] * 4, 4) == 0
    assert lose() == SHORTEST_PAUSE


def test_confidences_count_as_far_as_they_have_been_right():
    honest, boaster = DraftGain(COSTS), DraftGain(COSTS)
    for _ in range(40):
        # Two of three were right; what is behind the wrong one does not count.
        honest.add(4, [0.65, 0.7, 0.65, 0.1], 2)
        boaster.add(4, [0.99, 0.99, 0.99, 0.99], 2)
    assert honest.trust == pytest.approx(1, abs=0.02)
    assert boaster.trust == pytest.approx(2 / 2.97, abs=0.02)


def test_rows_of_a_large_batch_make_drafts_dear():
    gain = DraftGain(COSTS)
    alone, many = gain.least_likelihood(1), gain.least_likelihood(32)
    assert 0.4 < alone < 0.5
    assert 0.8 < many < 1.0


@pytest.mark.parametrize("company", [1, 3])
def test_a_pause_does_not_change_the_text(company):
    engine = EarlyExitEngine(MODEL.segmented)
    prompts = [[1 + i, 2, 3] for i in range(company)]
    full = engine.generate(prompts, SamplingParams(max_tokens=60))
    params = SamplingParams(mode="self_speculative", max_tokens=60)
    for one, other in zip(engine.generate(prompts, params), full, strict=True):
        assert one.token_ids == other.token_ids
        counts = one.statistics.drafts
        assert counts is not None
        assert 0 < counts.undrafted < 60
        assert counts.verifications <= 60


@pytest.mark.parametrize("options", [{"draft_confidence": 0.2}, {"exit_details": True}])
def test_who_says_when_to_draft_gets_no_pause(options):
    engine = EarlyExitEngine(MODEL.segmented)
    params = SamplingParams(mode="self_speculative", max_tokens=60, **options)
    (result,) = engine.generate([[1, 2, 3]], params)
    assert result.statistics.drafts is not None
    assert result.statistics.drafts.undrafted == 0 or "exit_details" in options
    if "exit_details" in options:
        assert all(len(heads) == 2 for heads in result.heads)
        full = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=60))[0]
        assert result.token_ids == full.token_ids


def test_a_pausing_sequence_asks_no_exit():
    engine = EarlyExitEngine(MODEL.segmented)
    params = SamplingParams(mode="self_speculative", max_tokens=60)
    request = engine.submit([1, 2, 3], params)
    asked = []
    while not request.is_finished:
        asking = request.sequence.is_asking
        before = request.mode._num_asked
        engine.step()
        asked.append((asking, request.mode._num_asked > before))
    assert any(asking for asking, _ in asked)
    assert not any(is_asked for asking, is_asked in asked if not asking)


def test_a_block_sees_what_runs_while_drafts_pause():
    """Others take over its keys and values."""
    shape = replace(LLAMA, max_position_embeddings=512)
    model = make_model(shape, exits=(2,), seed=3, **HEADS["block"])
    engine = EarlyExitEngine(model.segmented)
    drafting = SamplingParams(mode="self_speculative", max_tokens=330)
    (text,) = engine.generate([[1, 2, 3]], drafting)
    assert text.statistics.drafts is not None
    assert text.statistics.drafts.undrafted > 100
    leaving = SamplingParams(mode="early_exit", early_exit_threshold=0.5, max_tokens=4)
    for length in (100, 320):
        prompt = [1, 2, 3, *text.token_ids][:length]
        (after,) = engine.generate([prompt], leaving)
        (fresh,) = EarlyExitEngine(model.segmented).generate([prompt], leaving)
        assert after.statistics.num_cached_tokens > 0
        assert after.token_ids == fresh.token_ids
        assert after.confidences == pytest.approx(fresh.confidences, abs=1e-5)
