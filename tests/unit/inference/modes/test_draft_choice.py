"""Of several drafters the one that makes a text faster drafts most of it."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from megatron.early_exit.inference.engine.policy import Costs
from megatron.early_exit.inference.modes.draft_choice import HOPE, DraftChoice, Drafter
from megatron.early_exit.inference.modes.draft_gain import DraftCosts, DraftGain
from megatron.early_exit.inference.modes.mode import MTP
from tests.helpers.mtp_models import mtp_model

EXIT = Drafter(DraftCosts(ask=40.0, verify=70.0, full=100.0, rows=16.0, step=2.0), 4)
MODULE = Drafter(DraftCosts(ask=20.0, verify=100.0, full=100.0, rows=16.0, step=2.0), 1)
DRAFTERS = {0: EXIT, MTP: MODULE}


def decode(
    accuracies: Mapping[int, float], num_tokens: int, drafters: Mapping[int, Drafter] = DRAFTERS
) -> tuple[float, dict[int, int]]:
    """Steps of the full model for each token, where drafters are right so often; and how many
    tokens came with the drafts of each."""
    rng, choice = random.Random(1), DraftChoice(drafters)
    given, steps = 0, 0.0
    by: dict[int, int] = dict.fromkeys(drafters, 0)
    while given < num_tokens:
        head, costs = choice.current, drafters[choice.current].costs
        accuracy, drafts = accuracies[head], choice.most
        accepted = 0
        while accepted < drafts and rng.random() < accuracy:
            accepted += 1
        steps += drafts * costs.of_question() + costs.of_verification(drafts)
        given += accepted + 1
        by[head] += accepted + 1
        pause = choice.add(drafts, [accuracy] * drafts, accepted)
        given, steps = given + pause, steps + pause
    return steps / given, by


def test_before_any_draft_the_costs_decide():
    tokens, best = 1.0, 0.0
    for drafts in range(1, 5):
        tokens += HOPE**drafts
        steps = drafts * EXIT.costs.of_question() + EXIT.costs.of_verification(drafts)
        best = max(best, tokens / steps)
    assert EXIT.hope == pytest.approx(best)
    assert DraftChoice(DRAFTERS).current == max(DRAFTERS, key=lambda head: DRAFTERS[head].hope)
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
    assert spent < 1.04
    assert sum(by.values()) < 1000


def test_a_text_that_changes_changes_the_choice():
    choice = DraftChoice(DRAFTERS)
    found = []
    for accepted in ({0: 0, MTP: 1}, {0: 4, MTP: 0}):
        for _ in range(200):
            head = choice.current
            choice.add(choice.most, [0.9] * choice.most, accepted[head])
        found.append(choice.current)
    assert found == [MTP, 0]


def test_one_alone_keeps_its_account():
    choice, gain = DraftChoice({0: EXIT}), DraftGain(EXIT.costs)
    for round_ in range(60):
        confidences, accepted = [0.9] * (round_ % 4), (round_ % 4) // 2
        assert choice.add(4, confidences, accepted) == gain.add(4, confidences, accepted)
        assert (choice.gain.speed, choice.gain.trust) == (gain.speed, gain.trust)


def test_costs_of_the_module():
    shape = mtp_model(2).architecture
    costs = Costs((10.0, 20.0, 30.0), head=7.0, rows=9.0, step=0.1)
    depth = shape.layer_weights + 2 * shape.hidden_size**2
    expected = DraftCosts(depth + 0.65 * shape.hidden_size * 40, 67, 67, rows=9, step=6)
    assert costs.of_mtp_drafts(shape, 40) == expected
