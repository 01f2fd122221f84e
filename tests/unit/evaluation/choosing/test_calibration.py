"""How rules are tested: what is measured for it, and what is found, of losses that are given."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tqdm import tqdm

from megatron.early_exit.evaluation.choosing.calibration import Calibration, Gain
from megatron.early_exit.evaluation.choosing.choice import Choice, texts_hash
from megatron.early_exit.evaluation.choosing.needed import texts_needed, texts_short
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value
from megatron.early_exit.evaluation.choosing.paths import exit_sets, paths_of
from megatron.early_exit.evaluation.choosing.wish import Requirement, Wish, requirements_of
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.settings import Settings

THRESHOLDS = (0.2, 0.9, 0.6)
SETTINGS = Settings(
    tasks=("a",),
    thresholds=THRESHOLDS,
    measures=("max_probability",),
    kv_policies=("exact",),
    exit_layers=((1,),),
)
(PATH,) = paths_of(SETTINGS)
LIMIT = 0.2
ITEM = Item("a", "prompt")


class Records:
    """Gives records of given losses, and notes what was asked for."""

    def __init__(self, items, lost):
        self.items, self.lost, self.asked = items, lost, []

    def record(self, unit):
        self.asked.append((unit.kind, unit.index, unit.rule))
        return self.lost(unit.index, unit.rule)


def agreeing(share):
    """A record of ten tokens that count, and one behind the end of the text that does not."""
    wrong = round(share * 10)
    return {"agrees": [False] * wrong + [True] * (10 - wrong) + [False], "counted": 10}


def items(count, task="a"):
    return [Item(task, f"{task} {i}", "reference") for i in range(count)]


WISH = Wish(agreement=1 - LIMIT)


def calibration(records, wish=WISH, paths=(PATH,)):
    texts = records.items
    found = requirements_of(wish, texts)
    return Calibration(records, found, paths, wish.confidence, len(texts), tqdm(disable=True))


def test_a_path_has_falling_thresholds():
    assert [one.threshold for one in PATH.rules] == [0.9, 0.6, 0.2]


def test_stopping_early_decides_as_measuring_everything_does():
    for seed in range(16):
        draw = random.Random(seed)
        risk = draw.choice([0.02, 0.08, 0.12, 0.2])
        lost = [draw.random() < risk for _ in range(60)]
        records = Records(items(60), lambda i, rule, lost=lost: agreeing(float(lost[i])))
        tested = calibration(records).test(PATH)
        p = p_value(Losses.of(lost), LIMIT)
        assert tested[0].is_proven == (p <= 0.05)
        if tested[0].is_proven:
            assert (tested[0].p_value, tested[0].is_cut) == (p, False)
            assert len(records.asked) == 3 * 60
        else:
            assert 0.05 < tested[0].p_value <= p
            assert len(tested) == 1


def test_no_more_is_measured_than_is_needed():
    records = Records(items(60), lambda i, rule: agreeing(rule.threshold == 0.6))
    tested = calibration(records).test(PATH)
    assert [one.is_proven for one in tested] == [True, False]
    of_second = [one for one in records.asked if one[2].threshold == 0.6]
    # So many texts without any agreement are enough to give the second rule up.
    enough = next(n for n in range(61) if p_value(Losses(float(n), 60), LIMIT) > 0.05)
    assert len(of_second) == enough == tested[1].losses[0].texts
    assert tested[1].is_cut
    assert not [one for one in records.asked if one[2].threshold == 0.2]


def test_the_promise_has_to_hold_on_each_task():
    both = [*items(40, "a"), *items(40, "b")]
    records = Records(both, lambda i, rule: agreeing(i >= 40 and rule.threshold < 0.9))
    tested = calibration(records).test(PATH)
    assert [one.is_proven for one in tested] == [True, False]
    assert [(one.task, one.mean) for one in tested[1].losses] == [("a", 0.0), ("b", 1.0)]


def test_several_paths_share_the_error():
    paths = paths_of(replace(SETTINGS, exit_layers=((1,), (3,), (1, 3))))
    records = Records(items(14), lambda i, rule: agreeing(0))
    # 0.8^14 is 0.044.
    one, several = calibration(records), calibration(records, paths=paths)
    assert texts_short(one.requirements, one.level) == {}
    assert several.level == pytest.approx(0.05 / 3)
    short = texts_short(several.requirements, several.level)
    assert short == {"a": texts_needed(LIMIT, 0.05 / 3)}
    endless = Requirement(task="b", name="f1", limit=1e-9, indices=(0,))
    assert texts_short([endless, *one.requirements, endless], 0.05) == {"b": None}


def test_a_score_is_lost_where_the_full_model_has_more():
    scores = {FULL: [0.5, 0.25, 1.0], PATH.rules[0]: [0.25, 1.0, 1.0]}
    requirement = Requirement(task="a", name="f1", limit=0.1, indices=(0, 1, 2))

    def record(rule, i):
        return {"scores": {"f1": scores[rule][i]}}

    losses = [requirement.loss(ITEM, record(PATH.rules[0], i), record(FULL, i)) for i in range(3)]
    # What is won on the second text makes up for nothing.
    assert losses == [0.25, 0.0, 0.0]
    choice = Requirement(task="a", name="accuracy", limit=0.1, indices=(0,))
    assert choice.loss(ITEM, {"accuracy": None}, {"accuracy": True}) == 1.0
    assert (choice.is_binary, requirement.is_binary) == (True, False)


def test_what_is_behind_a_stop_text_is_not_counted():
    agreement = Requirement(task="a", name="agreement", limit=0.1, indices=(0,))
    record = {
        "agrees": [False, True, True, True, True],
        "token_texts": ["a", "b;", ";", " c", " d"],
        "counted": 5,
    }
    whole, stopping = Item("a", "p"), Item("a", "p", stop=("\n", ";;"))
    assert agreement.loss(whole, record, None) == 1 / 5
    # The second semicolon ends the text, and is chosen, too.
    assert agreement.loss(stopping, record, None) == 1 / 3
    assert agreement.loss(stopping, {**record, "counted": 2}, None) == 1 / 2


def test_choices_are_measured_once_for_the_full_model_too():
    choosing = [Item("a", f"p{i}", choices=("x", "y"), gold=0) for i in range(40)]
    records = Records(choosing, lambda i, rule: {"accuracy": rule != PATH.rules[2]})
    wish = Wish(task_loss=20)
    tested = calibration(records, wish).test(PATH)
    assert [one.is_proven for one in tested] == [True, True, False]
    assert {kind for kind, _, _ in records.asked} == {"choice"}
    assert len([one for one in records.asked if one[2] == FULL]) == 40


def test_the_fastest_proven_rule_is_chosen_only_if_it_is_faster_than_the_full_model():
    records = Records(
        [*items(40), Item("a", "timed")],
        lambda i, rule: {
            **agreeing(rule.threshold == 0.2),
            "exit_layers": [{0.9: 4, 0.6: 2, 0.2: 1}[rule.threshold]] * 11,
        },
    )
    found = Calibration(
        records,
        requirements_of(Wish(agreement=0.8), items(40)),
        (PATH,),
        0.95,
        40,
        tqdm(disable=True),
    )
    tested = {PATH: found.test(PATH)}
    proven = [one.rule for one in tested[PATH] if one.is_proven]
    gains = found.gains(proven, [40], by_time=False, seed=0)
    assert [gains[one].mean_exit_layer for one in proven] == [4.0, 2.0]
    choice = Choice(level=found.level, tested=tested, gains=gains, num_layers=4)
    assert choice.fastest() == Rule(0.6, "exact", "max_probability", (1,))
    shallow = Choice(level=found.level, tested=tested, gains=gains, num_layers=2)
    assert shallow.fastest() is None
    assert Choice(level=1.0, tested={}, gains={}, num_layers=4).fastest() is None


def test_a_speed_up_that_may_be_chance_is_none():
    wide, narrow, all_layers = PATH.rules
    gains = {wide: Gain(2.0, 1.5, (0.9, 2.0)), all_layers: Gain(4.0, 1.3, (1.1, 1.4))}
    assert Choice(level=0.05, tested={}, gains=gains, num_layers=4).fastest() is None
    unknown = {narrow: Gain(2.0, 1.5)}
    assert Choice(level=0.05, tested={}, gains=unknown, num_layers=4).fastest() is None
    gains[narrow] = Gain(3.0, 1.2, (1.1, 1.3))
    assert Choice(level=0.05, tested={}, gains=gains, num_layers=4).fastest() == narrow
    gains[wide] = Gain(2.0, 1.5, (1.05, 2.0))
    assert Choice(level=0.05, tested={}, gains=gains, num_layers=4).fastest() == narrow


def test_sets_of_exits():
    assert exit_sets([], (2, 4)) == ((2, 4), (2,), (4,))
    assert exit_sets([], (2,)) == ((2,),)
    assert exit_sets([(4,), None], (2, 4)) == ((4,), (2, 4))
    assert exit_sets([None], ()) == ((),)


def test_choices_have_no_agreement_and_every_task_needs_its_score():
    choosing = [Item("c", "p", choices=("x", "y"), gold=0)]
    with pytest.raises(ValueError, match="task c has choices, behind which nothing is written"):
        requirements_of(Wish(agreement=0.9), choosing)
    with pytest.raises(ValueError, match="--score f1: task c has none, allowed: accuracy, acc"):
        requirements_of(Wish(task_loss=1, score="f1"), choosing)
    with pytest.raises(ValueError, match="--score f1: task d has none, allowed: tasks whose"):
        requirements_of(Wish(task_loss=1), [Item("d", "p")])


def test_the_hash_is_of_the_texts_and_their_order():
    first, second = items(2)
    assert texts_hash([first, second]) != texts_hash([second, first])
    assert texts_hash([first, second]) == texts_hash(items(2))
