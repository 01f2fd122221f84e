"""Drafts that do not pay end soon, and drafts that pay go on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs, readings_of
from megatron.early_exit.inference.modes.draft_choice import DraftChoice, Drafter
from megatron.early_exit.inference.modes.draft_gain import (
    HOPE,
    DraftCosts,
    DraftGain,
    Readings,
    Waits,
)
from megatron.early_exit.inference.modes.pauses import (
    CREDIT,
    LONGEST_PAUSE,
    MOST_LOST,
    SHORTEST_PAUSE,
)
from tests.helpers.mtp_models import mtp_model
from tests.helpers.tiny_models import HEADS, LLAMA, make_model

COSTS = DraftCosts(ask=40.0, verify=70.0, full=100.0, rows=16.0, step=2.0, front=30.0)
MODEL = make_model(exits=(1, 3), use_exit_norm=True)


def account() -> DraftChoice:
    """Of a sequence with one drafter, which may pause."""
    return DraftChoice({0: Drafter(COSTS, 4)})


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


def test_messages_between_stages_are_shared_as_a_step_is():
    waits = Waits(ask=30, order=20, verify=50, full=60)
    costs = replace(COSTS, waits=waits)
    for company in (1, 8):
        full = seconds(100, 1, company) + 60 / company
        question = seconds(40, 1, company) + 30 / company
        verification = seconds(70, 3, company) + 50 / company
        assert costs.of_question(company) == pytest.approx(question / full)
        assert costs.of_verification(2, company) == pytest.approx(verification / full)
        expected = (3 * question + 20 / company + verification) / full
        assert costs.of_round(3, 2, company) == pytest.approx(expected)
        # What is not asked about the last draft has to pass the layers in front of the exit.
        front = 30 / company + 30 / 16
        expected = (2 * question + front + 20 / company + verification) / full
        assert costs.of_round(2, 2, company) == pytest.approx(expected)
        # Where nothing is asked there is no order either.
        unasked = seconds(70, 1, company) + 50 / company
        assert costs.of_round(0, 0, company) == pytest.approx((front + unasked) / full)


def test_several_rows_may_take_longer_to_read():
    costs = replace(COSTS, readings=Readings(two=1.25, several=2.0))
    full = 2 + 100 + 100 / 16
    for drafts, reading in ((0, 1), (1, 1.25), (2, 2), (3, 2)):
        expected = 2 + 70 * reading + 70 * (drafts + 1) / 16
        assert costs.of_verification(drafts) == pytest.approx(expected / full)
    # Of two sequences each has half of the reading, and so has a step of the full model.
    full = 1 + 100 * 1.25 / 2 + 100 / 16
    assert costs.of_question(2) == pytest.approx((1 + 40 * 1.25 / 2 + 40 / 16) / full)
    expected = 1 + 70 * 2 / 2 + 70 * 2 / 16
    assert costs.of_verification(1, 2) == pytest.approx(expected / full)
    # A draft has to be the surer, the more its row takes.
    gain = DraftGain(costs)
    steps = [gain.least_likelihood(1, drafts) for drafts in range(4)]
    assert steps[0] < steps[1] > steps[2] == pytest.approx(steps[3])


def test_readings_are_what_passes_take_without_the_time_of_rows():
    # A pass takes 3 seconds to read and 0.25 for each row; two rows are read in 4, more in 6.
    found = readings_of([3.25, 4.5, 7.0], rows=12.0)
    assert found == pytest.approx((4 / 3, 2.0))
    # Nothing is read faster because there is more to do.
    assert readings_of([3.25, 3.0, 3.0], rows=12.0) == (1.0, 1.0)


def test_costs_of_a_model_whose_layers_are_read_for_several_rows():
    costs = Costs((10.0, 20.0, 30.0), head=20.0, readings=Readings(two=1.2, several=1.8))
    # A quarter of the weights are the head's.
    assert costs.of_drafts(1).readings == pytest.approx((1.15, 1.6))


def test_the_rate_counts_questions_up_to_the_first_that_gave_no_right_draft():
    gain = DraftGain(COSTS)
    assert gain.rate == HOPE
    for _ in range(60):
        # Two drafts were right, a third one wrong, and what is behind it says nothing.
        gain.add(4, [0.9] * 4, 2)
    assert gain.rate == pytest.approx(2 / 3, abs=0.02)
    for _ in range(300):
        # The one that was made was right; the next time it was not sure enough.
        gain.add(2, [0.9], 1)
    assert gain.rate == pytest.approx(1 / 2, abs=0.02)


def test_costs_of_a_model():
    costs = Costs((10.0, 20.0, 30.0), head=7.0, exit_head=5.0, rows=9.0, step=0.1)
    expected = DraftCosts(ask=10 + 20 + 4 + 5, verify=30 + 7, full=67, rows=9, step=6, front=30)
    assert costs.of_drafts(1, block=4.0) == expected


@dataclass
class Exit:
    """An exit of a pretended model: how sure it is, and how often it is right."""

    confidences: tuple[float, ...]
    accuracy: float


def decode(exit_: Exit, num_tokens: int, company: int = 1, seed: int = 0) -> tuple[float, int]:
    """Steps of the full model that some tokens take, and how many of them had no drafts."""
    rng, choice = random.Random(seed), account()
    given, steps, undrafted = 0, 0.0, 0
    while given < num_tokens:
        gain = choice.gain
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
        steps += COSTS.of_round(asked, len(drafts), company)
        given += accepted + 1
        pause = choice.add(asked, drafts, accepted, company)
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
        assert sum(one > 0 for one in found) <= 4
    # Five tokens take about four questions and a verification of five rows, of which the last one
    # has yet to pass the layers in front of the exit.
    best = COSTS.of_round(4, 4) / (1 + 0.95 * 3.71)
    spent, _ = decode(Exit((0.95,), 0.95), 2000)
    assert spent < 1.05 * best


def test_what_is_lost_before_a_pause_is_bounded():
    choice, lost, pauses = account(), -CREDIT, []
    for _ in range(60):
        lost += COSTS.of_round(2, 1) - 1
        pause = choice.add(2, [0.9], 0)
        if pause:
            assert MOST_LOST <= lost < MOST_LOST + 1
            pauses.append(pause)
            lost = 0.0
    assert pauses[:3] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 4 * SHORTEST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_after_drafts_that_pay_the_next_pause_is_short_again():
    choice = account()

    def lose() -> int:
        while not (pause := choice.add(2, [0.9], 0)):
            pass
        return pause

    assert [lose(), lose()] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE]
    for _ in range(9):
        assert choice.add(4, [0.9] * 4, 4) == 0
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


def test_who_says_when_to_draft_gets_no_pause():
    engine = EarlyExitEngine(MODEL.segmented)
    params = SamplingParams(mode="self_speculative", max_tokens=60, draft_confidence=0.2)
    (result,) = engine.generate([[1, 2, 3]], params)
    assert result.statistics.drafts is not None
    assert result.statistics.drafts.undrafted == 0


@pytest.mark.parametrize("method", ["exit", "mtp"])
def test_what_is_recorded_changes_neither_drafts_nor_a_sampled_text(method):
    model = MODEL if method == "exit" else mtp_model(2, noise=1.0)
    engine = EarlyExitEngine(model.segmented)
    params = SamplingParams(
        mode="self_speculative", draft_method=method, max_tokens=60, temperature=1.0, seed=5
    )
    plain, told = (
        engine.generate([[1, 2, 3]], replace(params, exit_details=details))[0]
        for details in (False, True)
    )
    assert told.token_ids == plain.token_ids
    assert told.statistics.drafts == plain.statistics.drafts
    assert plain.statistics.drafts is not None
    assert 0 < plain.statistics.drafts.undrafted < 60
    # The drafter is asked in a pause, too; the module not about the first token nor the last one.
    numbers = [len(heads) for heads in told.heads]
    assert numbers == ([2] * 60 if method == "exit" else [1, *[2] * 58, 1])


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
