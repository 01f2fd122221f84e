"""Scores of texts, calibration and intervals, against other libraries and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron.early_exit.evaluation.bootstrap import interval
from megatron.early_exit.evaluation.calibration import calibration_bins
from megatron.early_exit.evaluation.perplexity import perplexity
from megatron.early_exit.evaluation.text_scores import exact_match, f1, rouge_l
from megatron.early_exit.evaluation.tradeoff import Answered, point


def test_rouge_is_that_of_its_library():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    draw = random.Random(0)
    known = ["the", "Quick", "brown", "fox", "jumps"]
    found = set()
    for _ in range(60):
        first, second = (" ".join(draw.choices(known, k=draw.randint(1, 9))) for _ in range(2))
        wanted = scorer.score(second, first)["rougeL"].fmeasure
        assert rouge_l(first, second) == pytest.approx(wanted)
        found.add(wanted)
    assert len(found) > 10


def test_scores_of_texts_by_hand():
    assert exact_match(" return x\n", "return x") == 1
    assert exact_match("return  x", "return x") == 0
    # 3 of 5 and of 4 words: "x", "=", "1" in any order.
    assert f1("1 = x + y", "X = 1;") == pytest.approx(2 * 3 / (5 + 4))
    # The longest in order: "1", or "=", or "x".
    assert rouge_l("1 = x + y", "X = 1;") == pytest.approx(2 * 1 / (5 + 4))
    assert f1("", "") == rouge_l("", " ") == 1
    assert f1("", "a") == rouge_l("a", "") == 0


def test_bins_of_confidence_by_hand():
    confidences = np.array([0.0, 0.05, 0.93, 0.97, 1.0, 0.5])
    agrees = np.array([0, 1, 1, 0, 1, 1.0])
    low, middle, high = calibration_bins(confidences, agrees)
    assert (low.low, low.high, low.count) == (0.0, 0.1, 2)
    assert (low.mean_confidence, low.agreement) == pytest.approx((0.025, 0.5))
    assert (middle.low, middle.count, middle.agreement) == (0.5, 1, 1.0)
    assert (high.high, high.count) == (1.0, 3)
    assert high.mean_confidence == pytest.approx(2.9 / 3)
    assert high.agreement == pytest.approx(2 / 3)


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).exponential(size=30)
    rows = np.stack([values, np.ones(30)], axis=1)
    found = interval(rows, lambda sums: sums[:, 0] / sums[:, 1], resamples=20000)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", random_state=1
    ).confidence_interval
    assert found == pytest.approx((wanted.low, wanted.high), rel=0.02)
    assert interval(rows[:1], lambda sums: sums[:, 0]) is None


def test_a_point_weighs_prompts_by_their_tokens_and_seconds():
    answers = [
        Answered(3, 1.0, 3, 2.0, [2, 2, 4, 2], [True] * 4, [True, False], [-1.0] * 4),
        Answered(1, 1.0, 1, 3.0, [4, 4], [False, True], [True, True], [-2.0] * 2),
    ]
    found = point("name", 0.5, answers, seed=0)
    assert found.tokens_per_second == 4 / 2
    assert found.speedup == pytest.approx(5 / 2)
    assert found.mean_exit_layer == 18 / 6
    assert found.agreement == 5 / 6
    assert found.identical == 3 / 4
    assert found.perplexity == pytest.approx(np.exp(8 / 6))
    assert found.speedup_interval == (2.0, 3.0)
    assert point("name", 0.5, answers).speedup_interval is None


def test_perplexity_knows_what_is_impossible():
    texts = [{"logprob": -3.0, "tokens": 2}, None, {"logprob": -1.0, "tokens": 2}]
    assert perplexity(texts) == pytest.approx(np.e)
    assert perplexity([*texts, {"logprob": None, "tokens": 1}]) is None
    assert perplexity([None]) is None
