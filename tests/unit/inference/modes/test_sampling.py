"""What one request asks of the choice of its tokens, and its random numbers."""

import random

import pytest

from tests.helpers.row_sampling import make_sampler

PROMPT = [3, 7, 7, 1]


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({}, [True] * 4),
        ({"top_k": 5, "top_p": 0.5}, [True] * 4),
        ({"temperature": 0.5}, [False] * 4),
        ({"repetition_penalty": 1.1}, [False] * 4),
        ({"presence_penalty": 0.1}, [False] * 4),
        ({"frequency_penalty": -0.1}, [False] * 4),
        ({"logit_bias": {5: 1}}, [False] * 4),
        ({"min_tokens": 2}, [False, False, True, True]),
    ],
)
def test_greedy_is_the_largest_logit(fields, greedy):
    sampler = make_sampler(PROMPT, [4], 200, **{"temperature": 0.0} | fields)
    assert [sampler.is_greedy(count) for count in range(4)] == greedy


def test_without_stops_min_tokens_forbids_nothing():
    assert make_sampler(temperature=0.0, min_tokens=2).is_greedy(0)


def test_some_token_must_be_allowed():
    with pytest.raises(ValueError, match=r"min_tokens 1 is out of range, allowed: 0 where all of"):
        make_sampler(stops=range(5), min_tokens=1)
    make_sampler(stops=[4, 9], min_tokens=1)  # 9 is no token of the model


# --- random numbers --------------------------------------------------------------------------


def test_seeds():
    first, same, other = (make_sampler(seed=seed) for seed in (7, 7, 8))
    numbers = [first.number(index) for index in range(1000)]
    assert numbers == [same.number(index) for index in range(1000)]
    assert numbers != [other.number(index) for index in range(1000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert sum(numbers) / 1000 == pytest.approx(0.5, abs=0.03)
    drawn = make_sampler(seed=None)
    assert drawn.seed != make_sampler(seed=None).seed
    assert make_sampler(seed=drawn.seed).number(0) == drawn.number(0)


def test_numbers_that_were_looked_at_are_taken_in_order():
    sampler, generator = make_sampler(seed=5), random.Random(5)
    expected = [generator.getrandbits(52) / 2**52 for _ in range(9)]
    assert [sampler.number(index) for index in (3, 0, 3, 5)] == [expected[i] for i in (3, 0, 3, 5)]
    sampler.take_numbers(2)
    assert [sampler.number(index) for index in (2, 3, 8)] == [expected[i] for i in (2, 3, 8)]
    assert sampler.num_taken == 2
    sampler.take_numbers(5)
    assert sampler.number(7) == expected[7]
