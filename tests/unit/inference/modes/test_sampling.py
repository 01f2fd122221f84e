"""Filters and draws of one request, against Hugging Face's and against arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.modes.sampling import (
    Sampler,
    limit_to_min_p,
    limit_to_top_k,
    limit_to_top_p,
)

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
PROMPT = [3, 7, 7, 1]
CPU = torch.device("cpu")


def make_sampler(prompt=(), stops=(), vocab_size=5, **fields):
    params = SamplingParams(**{"seed": 0, "temperature": 1.0} | fields)
    return Sampler(params, prompt, stops, vocab_size, CPU)


def random_logits(seed, size=200):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def kept(logits):
    return torch.isfinite(logits).nonzero().flatten().tolist()


# --- filters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k(k, expected):
    assert kept(limit_to_top_k(PROBABILITIES.log(), k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, [1]),
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.8, [1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p(p, expected):
    assert kept(limit_to_top_p(PROBABILITIES.log(), p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [0, 1, 2, 3, 4]), (0.24, [0, 1, 3, 4]), (0.26, [1, 3, 4]), (1.0, [1])]
)
def test_min_p(p, expected):
    assert kept(limit_to_min_p(PROBABILITIES.log(), p)) == expected


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("p", [0.1, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary(spread, p):
    """The shortcut for small nuclei finds what ordering everything does."""
    size = 40_000
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(size, generator=generator) * spread
    ordered = logits.double().softmax(dim=0).sort(descending=True).values
    # How many tokens reach p, give or take what fp32 makes of their probabilities.
    least, most = (int((ordered.cumsum(0) < p + slack).sum()) + 1 for slack in (-1e-5, 1e-5))
    is_kept = limit_to_top_p(logits, p).isfinite()
    assert least <= int(is_kept.sum()) <= most
    assert logits[is_kept].min() >= logits[~is_kept].max()


# --- distributions ---------------------------------------------------------------------------


def reference(logits, generated, prompt=PROMPT, stops=(), **fields):
    """The distribution that Hugging Face's processors give, in our order."""
    params = SamplingParams(**fields)
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
        if params.repetition_penalty != 1.0
        else []
    )
    if params.min_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(stops))
        )
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    top_p = params.top_p
    for _ in generated:
        top_p = max(top_p * params.top_p_decay, params.top_p_bound)
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    ids = torch.tensor([[*prompt, *generated]])
    return processors(ids, logits[None].clone())[0].softmax(dim=-1)


GENERATED = [5, 7, 199]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.6},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.9, "top_p_decay": 0.9},
        {"temperature": 1.5, "top_p": 0.9, "top_p_decay": 0.5, "top_p_bound": 0.4},
        {"temperature": 1.0, "min_tokens": 4},
        {
            "temperature": 2.5,
            "repetition_penalty": 1.2,
            "min_tokens": 9,
            "min_p": 0.02,
            "top_k": 30,
            "top_p": 0.95,
            "top_p_decay": 0.97,
        },
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_distribution_is_that_of_hugging_face(fields, seed):
    logits = random_logits(seed)
    stops = logits.topk(2).indices.tolist()
    sampler = make_sampler(PROMPT, stops, len(logits), **fields)
    before = logits.clone()
    for count in range(len(GENERATED) + 1):
        found = sampler.distribution(logits, GENERATED[:count])
        expected = reference(logits, GENERATED[:count], stops=stops, **fields)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert (found == 0).equal(expected == 0)
    assert logits.equal(before)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30),
    st.floats(0, 100),
    st.floats(0.01, 100),
    st.floats(0, 1),
    st.integers(0, 40),
    st.floats(0.001, 1),
    st.floats(1e-9, 1),
    st.lists(st.integers(0, 1), max_size=300),
)
def test_distribution_is_one(values, temperature, penalty, min_p, top_k, top_p, decay, generated):
    sampler = make_sampler(
        [0],
        [1],
        len(values),
        temperature=temperature,
        repetition_penalty=penalty,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
        top_p_decay=decay,
        min_tokens=1,
    )
    probabilities = sampler.distribution(torch.tensor(values), generated)
    assert probabilities.dtype == torch.float32
    assert probabilities.min() >= 0
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    assert generated or probabilities[1] == 0
    assert probabilities[sampler.draw(probabilities)] > 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-3])
def test_a_small_temperature_is_nearly_greedy(temperature):
    probabilities = make_sampler(temperature=temperature).distribution(PROBABILITIES.log(), [])
    assert probabilities.tolist() == [0, 1, 0, 0, 0]


def test_a_large_temperature_is_nearly_uniform():
    sampler = make_sampler(temperature=100, min_tokens=1, stops=[1])
    probabilities = sampler.distribution(PROBABILITIES.log(), [])
    assert probabilities.tolist() == pytest.approx([0.25, 0, 0.25, 0.25, 0.25], abs=0.01)


def test_penalties_and_bias_are_added_to_logits():
    fields = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {0: 2.0, 3: -100}}
    sampler = make_sampler([1, 4], temperature=1.0, **fields)
    logits = PROBABILITIES.log()
    adjusted = logits + torch.tensor([2.0, 0, -0.25, -100, 0])
    torch.testing.assert_close(sampler.distribution(logits, [2]), adjusted.softmax(dim=0))
    # Two times token 2, once token 1; the prompt does not count.
    adjusted = logits + torch.tensor([2.0, -0.25, 0, -100, 0])
    torch.testing.assert_close(sampler.distribution(logits, [2, 1, 2]), adjusted.softmax(dim=0))


def test_low_precision_logits_are_sampled_in_fp32():
    logits = random_logits(0, 4096).bfloat16()
    sampler = make_sampler(vocab_size=4096, top_p=0.9)
    exact = sampler.distribution(logits.float(), [])
    assert sampler.distribution(logits, []).equal(exact)


# --- greedy ----------------------------------------------------------------------------------


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


def test_temperature_0_takes_the_best_of_what_is_left():
    sampler = make_sampler([3], [1], temperature=0.0, repetition_penalty=2.0, min_tokens=1)
    logits = torch.tensor([1.0, 9.0, 1.5, 2.5, -1.0])
    assert sampler.distribution(logits, []).tolist() == [0, 0, 1, 0, 0]
    assert sampler.distribution(logits, [2]).tolist() == [0, 1, 0, 0, 0]


def test_some_token_must_be_allowed():
    with pytest.raises(ValueError, match=r"min_tokens 1 is out of range, allowed: 0 where all of"):
        make_sampler(stops=range(5), min_tokens=1)
    make_sampler(stops=[4, 9], min_tokens=1)  # 9 is no token of the model


# --- draws -----------------------------------------------------------------------------------


def test_draws_follow_the_limited_distribution():
    sampler = make_sampler(temperature=0.5, top_k=3)
    probabilities = sampler.distribution(PROBABILITIES.log(), [])
    squared = PROBABILITIES.square() * torch.tensor([0, 1, 0, 1, 1])
    torch.testing.assert_close(probabilities, squared / squared.sum())
    draws = [sampler.draw(probabilities) for _ in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    assert torch.allclose(share, probabilities, atol=0.03)


@pytest.mark.parametrize(
    "possible", [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], [1e-30, 1.0, 1e-30], [0.3] * 7]
)
def test_a_draw_is_never_of_an_impossible_token(monkeypatch, possible):
    sampler = make_sampler()
    probabilities = torch.tensor([0.0, *possible, 0.0])
    for uniform in (0.0, 0.5, 1 - 2**-52):
        monkeypatch.setattr(sampler, "uniform", lambda uniform=uniform: uniform)
        assert probabilities[sampler.draw(probabilities)] > 0


@pytest.mark.parametrize("vocab_size", [2, 50_000])
def test_a_draw_takes_one_number(vocab_size):
    one, other = make_sampler(seed=5), make_sampler(seed=5)
    one.draw(torch.ones(vocab_size) / vocab_size)
    other.uniform()
    assert one.uniform() == other.uniform()


def test_seeds():
    first, same, other = (make_sampler(seed=seed) for seed in (7, 7, 8))
    numbers = [first.uniform() for _ in range(1000)]
    assert numbers == [same.uniform() for _ in range(1000)]
    assert numbers != [other.uniform() for _ in range(1000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert sum(numbers) / 1000 == pytest.approx(0.5, abs=0.03)
    drawn = make_sampler(seed=None)
    assert drawn.seed != make_sampler(seed=None).seed
    assert make_sampler(seed=drawn.seed).uniform() == drawn.uniform()


# --- rejection sampling ----------------------------------------------------------------------


def distributions(size):
    weights = st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any)
    return weights.map(lambda w: torch.tensor(w, dtype=torch.float32) / sum(w))


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(distributions(n), distributions(n))))
def test_keeping_or_replacing_gives_the_target_exactly(pair):
    """The probability of every token, added up over the draft: no draw, no chance of a miss."""
    target, draft = pair
    kept_share = torch.minimum(target, draft)
    refused = 1 - kept_share.sum()
    residual = Sampler.residual(target, draft)
    assert float(residual.sum()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(kept_share + refused * residual, target, rtol=0, atol=1e-6)
    if refused > 1e-6:
        assert (residual[target <= draft] == 0).all()


def test_residual_of_equals_is_the_target():
    assert Sampler.residual(PROBABILITIES, PROBABILITIES).equal(PROBABILITIES)


def test_speculated_tokens_are_distributed_as_the_target():
    """Pearson's chi-square of drafted, kept and replaced tokens, for one seed."""
    draft = torch.tensor([0.5, 0.1, 0.2, 0.0, 0.2])
    sampler = make_sampler(seed=3)
    count = 20_000
    observed = torch.zeros(5, dtype=torch.float64)
    for _ in range(count):
        token = sampler.draw(draft)
        if sampler.uniform() * float(draft[token]) >= float(PROBABILITIES[token]):
            token = sampler.draw(Sampler.residual(PROBABILITIES, draft))
        observed[token] += 1
    expected = PROBABILITIES.double() * count
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # With 4 degrees of freedom, above 18.5 in one of a thousand seeds.
    assert chi_square < 18.5
