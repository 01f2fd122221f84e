"""Measures of confidence, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.early_exit.inference.modes.head_output import head_figures, head_outputs
from megatron.early_exit.inference.modes.measures import Judging
from tests.helpers.reference_decoder import ReferenceHead, confidence_of

NAMES = ("margin", "entropy", "similarity")


def no_streams(rows):
    raise AssertionError("no measure here needs them")


def by_definition(measure: str, logits: torch.Tensor, num_answers: int) -> list[float]:
    nothing = torch.empty(0)
    head = ReferenceHead(logits, num_answers, nothing, nothing)
    return [confidence_of(head, row, measure) for row in range(len(logits))]


def computed(measure: str, logits: torch.Tensor, num_answers: int) -> list[float]:
    judging = Judging([measure] * len(logits), logits.shape[-1] - num_answers, no_streams)
    ((rows, found),) = judging.confidences(logits, head_figures(logits))
    assert rows == list(range(len(logits)))
    return found.tolist()


@pytest.mark.parametrize("measure", ["margin", "entropy"])
@pytest.mark.parametrize("num_tokens", [2, 61, 1024, 1025, 5000])
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_confidences_of_logits(measure, num_tokens, num_rows, scale):
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_rows, num_tokens, generator=generator) * scale
    found = computed(measure, logits, num_tokens)
    expected = by_definition(measure, logits, num_tokens)
    assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert all(0 <= one <= 1 for one in found)


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_tokens_that_a_head_cannot_answer_with_do_not_count(measure):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(logits, (0, 30), value=-math.inf)
    assert computed(measure, padded, 50) == pytest.approx(computed(measure, logits, 50), rel=1e-6)
    # Nor do tokens of probability 0 among the others, but for the number of tokens.
    within = padded[:, :60].clone()
    expected = by_definition(measure, within, 60)
    assert computed(measure, within, 60) == pytest.approx(expected, rel=1e-5)


def test_the_ends_of_the_scale():
    logits = torch.zeros(3, 1500)
    logits[1, 1100] = 200.0
    logits[2, [7, 1300]] = 200.0
    assert computed("margin", logits, 1500) == [0.0, 1.0, 0.0]
    assert computed("entropy", logits, 1500) == pytest.approx(
        [0.0, 1.0, 1 - math.log(2) / math.log(1500)], abs=1e-6
    )


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_logits_that_are_no_numbers_give_no_confidence(measure):
    logits = torch.zeros(1, 2000)
    logits[0, 5] = math.nan
    assert not 0 <= computed(measure, logits, 2000)[0] <= 1


def test_similarity_is_the_cosine_where_it_is_positive():
    here = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    before = torch.tensor([[2.0, 0.0], [4.0, 3.0], [-1.0, 0.0], [1.0, 0.0]])
    judging = Judging(["similarity"] * 4, 0, lambda rows: (here[rows], before[rows]))
    logits = torch.zeros(4, 5)
    ((_, found),) = judging.confidences(logits, head_figures(logits))
    assert found.tolist() == pytest.approx([1.0, 0.96, 0.0, 0.0])


def test_each_row_is_judged_by_its_own_measure():
    generator = torch.Generator().manual_seed(0)
    logits, here, before = (torch.randn(5, size, generator=generator) for size in (61, 8, 8))
    measures = ["entropy", "max_probability", "similarity", "margin", "entropy"]
    asked = []

    def streams(rows):
        asked.append(list(rows))
        return here[rows], before[rows]

    judging = Judging.by(measures, 0, streams)
    outputs = head_outputs(logits, judging=judging)
    for row, measure in enumerate(measures):
        head = ReferenceHead(logits, 61, here, before)
        assert outputs[row].confidence == pytest.approx(
            confidence_of(head, row, measure), rel=1e-5, abs=1e-6
        )
    # Those of other rows may not be there.
    assert asked == [[2]]
    plain = head_outputs(logits)
    assert [one.best_token for one in outputs] == [one.best_token for one in plain]
    assert outputs[1].confidence == plain[1].confidence
    figures = head_figures(logits)
    assert head_outputs(logits, figures, judging)[3].confidence == outputs[3].confidence


def test_nothing_more_is_computed_for_the_largest_probability():
    assert Judging.by(["max_probability"] * 3, 0, no_streams) is None
    assert Judging.by([], 0, no_streams) is None
