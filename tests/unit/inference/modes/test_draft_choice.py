"""Of several drafters the one that makes a text faster drafts most of it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.modes.draft_choice import OPTIMISM, DraftChoice, Drafter, Record
from megatron.early_exit.inference.modes.draft_gain import HOPE, DraftCosts, DraftGain, Waits
from megatron.early_exit.inference.modes.mode import MTP
from tests.helpers.mtp_models import mtp_model

EXIT = Drafter(DraftCosts(ask=40.0, verify=70.0, full=100.0, rows=16.0, step=2.0, front=30.0), 4)
MODULE = Drafter(DraftCosts(ask=20.0, verify=100.0, full=100.0, rows=16.0, step=2.0), 1)
DRAFTERS = {0: EXIT, MTP: MODULE}


def exits_of(*depths: float) -> dict[int, Drafter]:
    """Exits of a model behind such shares of its layers, whose head has a tenth of the weights."""
    return {
        index: Drafter(
            DraftCosts(90 * depth + 10, 100 - 90 * depth, 100, rows=16, step=2, front=90 * depth), 4
        )
        for index, depth in enumerate(depths)
    }


FOUR_EXITS = exits_of(0.15, 0.3, 0.5, 0.75)


def decode(
    accuracies: Mapping[int, float],
    num_tokens: int,
    drafters: Mapping[int, Drafter] = DRAFTERS,
    company: int = 1,
    seed: int = 1,
) -> tuple[float, dict[int, int]]:
    """Steps of the full model for each token, where drafters are right so often; and how many
    tokens came with the drafts of each."""
    rng, choice = random.Random(seed), DraftChoice(drafters)
    given, steps = 0, 0.0
    by: dict[int, int] = dict.fromkeys(drafters, 0)
    while given < num_tokens:
        head, costs, gain = choice.current, drafters[choice.current].costs, choice.gain
        accuracy, likelihood, asked = accuracies[head], 1.0, 0
        drafts: list[float] = []
        while len(drafts) < choice.most:
            likelihood *= min(accuracy * gain.trust, 1)
            asked += 1
            if likelihood < gain.least_likelihood(company):
                break
            drafts.append(accuracy)
        accepted = 0
        while accepted < len(drafts) and rng.random() < accuracy:
            accepted += 1
        steps += costs.of_round(asked, len(drafts), company)
        given += accepted + 1
        by[head] += accepted + 1
        pause = choice.add(asked, drafts, accepted, company)
        given, steps = given + pause, steps + pause
    return steps / given, by


def test_before_any_draft_the_costs_decide():
    tokens, best = 1.0, 0.0
    for drafts in range(1, 5):
        tokens += HOPE**drafts
        steps = EXIT.costs.of_round(drafts, drafts)
        best = max(best, tokens / steps)
    assert EXIT.speed() == pytest.approx(best)
    assert DraftChoice(DRAFTERS).current == max(DRAFTERS, key=lambda head: DRAFTERS[head].speed())
    cheap = Drafter(DraftCosts(ask=1.0, verify=70.0, full=100.0, rows=16.0), 4)
    assert DraftChoice({0: EXIT, 1: cheap}).current == 1
    assert DraftChoice({0: cheap, 1: EXIT}).current == 0


@pytest.mark.parametrize(
    ("accuracies", "better"),
    [({0: 0.3, MTP: 0.9}, MTP), ({0: 0.97, MTP: 0.3}, 0), ({0: 0.98, MTP: 0.6}, 0)],
)
def test_the_better_one_drafts_most(accuracies, better):
    spent, by = decode(accuracies, 2000)
    assert by[better] > 0.8 * sum(by.values())
    alone = min(decode(accuracies, 2000, {head: DRAFTERS[head]})[0] for head in DRAFTERS)
    assert spent < 1.08 * alone


def test_where_neither_pays_drafts_pause():
    spent, by = decode({0: 0.05, MTP: 0.05}, 2000)
    assert spent < 1.02
    assert sum(by.values()) < 1000


@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize("accuracies", [(0.3, 0.95, 0.95, 0.96), (0.5, 0.95, 0.5, 0.96)])
def test_of_all_exits_the_second_is_found_where_it_is_best(accuracies, seed):
    rates = dict(enumerate(accuracies))
    spent, by = decode(rates, 1500, FOUR_EXITS, seed=seed)
    assert by[1] > 0.8 * sum(by.values())
    alone, _ = decode(rates, 1500, {1: FOUR_EXITS[1]}, seed=seed)
    assert spent < 1.1 * alone < 0.85
    # Where one pays already, a deeper one has its trial.
    _, by = decode({0: 0.3, 1: 0.8, 2: 0.98, 3: 0.98}, 1500, FOUR_EXITS, seed=seed)
    assert by[2] > 0.8 * sum(by.values())


@pytest.mark.parametrize("company", [1, 8])
@pytest.mark.parametrize("accuracy", [0.0, 0.2, 0.35])
def test_where_no_exit_pays_two_percent_are_lost_at_most(accuracy, company):
    for num_tokens in (400, 1500):
        drafters = {**FOUR_EXITS, MTP: MODULE}
        rates = dict.fromkeys(drafters, accuracy)
        spent, by = decode(rates, num_tokens, drafters, company)
        assert spent <= 1.02
        assert sum(by.values()) < num_tokens / 2


def test_what_one_exit_has_shown_says_what_to_hope_of_others():
    drafters = exits_of(0.25, 0.5, 0.75)
    choice = DraftChoice(drafters)
    assert [choice._hope(head) for head in drafters] == [HOPE, OPTIMISM, OPTIMISM]
    choice._tried.update({*drafters, MTP})
    choice._records[1] = Record(speed=1.0, rate=0.9, last=0)
    left = drafters[2].costs.verify / drafters[1].costs.verify
    # A deeper one has less left behind it; a shallower one is no better than what is known of all.
    assert choice._hope(2) == pytest.approx(1 - 0.1 * left)
    assert choice._hope(0) == HOPE
    choice._records[1] = Record(speed=1.0, rate=0.3, last=0)
    assert (choice._hope(0), choice._hope(2)) == (0.3, HOPE)
    assert choice._hope(MTP) == HOPE


def test_round_trips_between_stages_decide_too():
    """The module on the last stage is ordered once for a verification; where the first stage has
    the exit, a question of it takes no message at all."""
    messages = Waits(order=200, verify=400, full=400)
    far = MODULE._replace(costs=replace(MODULE.costs, waits=messages))
    near = EXIT._replace(costs=replace(EXIT.costs, waits=Waits(verify=400, full=400)))
    rates = {0: 0.85, MTP: 0.85}
    _, by = decode(rates, 1000)
    assert by[MTP] > by[0]
    _, by = decode(rates, 1000, {0: near, MTP: far})
    assert by[0] > 0.9 * sum(by.values())
    # Where messages take all the time, an order takes as long as a token over two stages.
    messages = Waits(order=900, verify=900, full=900)
    far = MODULE._replace(costs=replace(MODULE.costs, waits=messages))
    spent, by = decode({MTP: 0.6}, 1000, {MTP: far})
    assert spent < 1.02
    assert by[MTP] < 100


def test_a_trial_that_fails_pauses_nothing_where_earlier_gains_pay_for_it():
    choice = DraftChoice(FOUR_EXITS)
    choice._begin(1)
    for _ in range(4):
        assert choice.add(4, [0.9] * 4, 4) == 0
    choice._record()
    choice._begin(3)
    while choice.current == 3:
        assert choice.add(4, [0.9] * 4, 0) == 0
    assert choice.current == 1


def test_a_text_that_changes_changes_the_choice():
    choice = DraftChoice(DRAFTERS)
    found = []
    for accepted in ({0: 0, MTP: 1}, {0: 4, MTP: 0}):
        for _ in range(200):
            head = choice.current
            choice.add(choice.most, [0.9] * choice.most, accepted[head])
        found.append(choice.current)
    assert found == [MTP, 0]


@pytest.mark.parametrize(
    ("accuracies", "best"), [((0.3, 0.3, 0.3, 0.3), 0), ((0.2, 0.75, 0.3, 0.3), 1)]
)
def test_where_drafts_may_not_pause_the_one_goes_on_that_loses_least(accuracies, best):
    """Whoever says how sure a drafter has to be has four drafts at a time, also where that is
    slower than no drafts at all."""
    drafters = {**FOUR_EXITS, MTP: Drafter(MODULE.costs, 4)}
    rates = {**dict(enumerate(accuracies)), MTP: 0.1}
    rng, choice = random.Random(3), DraftChoice(drafters, may_pause=False)
    steps, tokens, changes = 0.0, 0, 0
    while tokens < 3000:
        head, accepted = choice.current, 0
        while accepted < 4 and rng.random() < rates[head]:
            accepted += 1
        tokens += accepted + 1
        steps += drafters[head].costs.of_round(4, 4)
        assert choice.add(4, [0.9] * 4, accepted) == 0
        changes += choice.current != head
    alone = {
        head: one.costs.of_round(4, 4) / sum(rates[head] ** count for count in range(5))
        for head, one in drafters.items()
    }
    assert min(alone, key=lambda head: alone[head]) == best
    assert steps / tokens < 1.08 * alone[best]
    assert changes < 80


@pytest.mark.parametrize("options", [{}, {"exit_details": True}, {"draft_confidence": 0.3}])
def test_whose_request_says_when_to_draft_does_not_pause(options):
    engine = EarlyExitEngine(mtp_model(2, exits=(1, 2, 3)).segmented)
    params = SamplingParams(mode="self_speculative", draft_method="auto", **options)
    choice = engine.submit([1, 2, 3], params).mode.choice
    assert set(choice.heads) == {0, 1, 2, MTP}
    pauses = [choice.add(choice.most, [0.9] * choice.most, 0) for _ in range(60)]
    assert any(pauses) == ("draft_confidence" not in options)


@pytest.mark.parametrize("accepted", [4, 0])
def test_drafters_are_not_compared_behind_each_verification(accepted, monkeypatch):
    compared, tokens = [], 0
    monkeypatch.setattr(DraftChoice, "_compare", lambda self: compared.append(tokens))
    choice = DraftChoice(FOUR_EXITS, may_pause=False)
    loss = choice.gain._costs.of_round(4, 4) - 1
    for _ in range(100):
        tokens += accepted + 1
        choice.add(4, [0.9] * 4, accepted)
    # Every 25 tokens; or as soon as more than another step has been lost.
    between = 25 if accepted else math.floor(1 / loss) + 1
    assert compared == list(range(between, tokens + 1, between))


def test_the_rows_that_the_module_lacks_count_when_it_is_to_draft_again():
    costs = replace(MODULE.costs, missed=3.0)
    full_step = 2 + 100 * (1 + 1 / 16)
    assert costs.of_missed(800) == pytest.approx(3 * 800 / 16 / full_step)
    choice = DraftChoice({0: EXIT, MTP: Drafter(costs, 2)})
    choice._begin(MTP)
    total, promise = 0.0, choice._promise(MTP)
    # It is left, and the exit drafts for a long time: each depth has still to see all its tokens.
    choice._record()
    choice._begin(0)
    choice._records.clear()
    while choice._tokens < 800:
        total += 5 - EXIT.costs.of_round(4, 4)
        assert choice.add(4, [0.9] * 4, 4) == 0
        choice._records.clear()
    missed = 2 * costs.of_missed(800)
    assert choice._total == pytest.approx(total)
    assert 150 / choice._promise(MTP) == pytest.approx(150 / promise + missed)
    choice._record()
    choice._begin(MTP)
    assert choice._total == pytest.approx(total - missed)
    # A pause is missed, too.
    choice, total, pause = DraftChoice({MTP: Drafter(costs, 2)}), 0.0, 0
    while not pause:
        total += 1 - costs.of_round(2, 2)
        pause = choice.add(2, [0.9] * 2, 0)
    assert choice._total == pytest.approx(total - 2 * costs.of_missed(pause))


def test_one_alone_keeps_its_account():
    choice, gain = DraftChoice({0: EXIT}), DraftGain(EXIT.costs)
    for round_ in range(60):
        confidences, accepted = [0.9] * (round_ % 4), (round_ % 4) // 2
        gain.add(4, confidences, accepted)
        if choice.add(4, confidences, accepted):
            gain = DraftGain(EXIT.costs)
        assert (choice.gain.speed, choice.gain.trust) == (gain.speed, gain.trust)


def test_costs_of_the_module():
    shape = mtp_model(2).architecture
    costs = Costs((10.0, 20.0, 30.0), head=7.0, rows=9.0, step=0.1)
    depth = shape.layer_weights + 2 * shape.hidden_size**2
    head = 0.65 * shape.hidden_size * 40
    expected = DraftCosts(depth + head, 67, 67, rows=9, step=6, missed=depth)
    assert costs.of_mtp_drafts(shape, 40) == expected
