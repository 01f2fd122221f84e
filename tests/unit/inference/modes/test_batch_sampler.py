"""Tokens drawn for many positions at once, against Hugging Face's filters, arithmetic, and one
row at a time."""

from __future__ import annotations

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
from megatron.early_exit.inference.modes import batch_sampler
from megatron.early_exit.inference.modes.batch_sampler import draw
from megatron.early_exit.inference.modes.draw import Draft, Draw
from tests.helpers.row_sampling import (
    distribution,
    make_sampler,
    reference_distribution,
    reference_token,
    reference_verification,
)

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
PROMPT = [3, 7, 7, 1]


def random_logits(seed, size=200):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


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
        found = distribution(sampler, logits, GENERATED[:count])
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
    probabilities = distribution(sampler, torch.tensor(values), generated)
    assert probabilities.dtype == torch.float32
    assert probabilities.min() >= 0
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    assert generated or probabilities[1] == 0
    (drawn,) = draw([torch.tensor(values)], [Draw(sampler, generated, (), 0)])
    assert probabilities[drawn.token] > 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-3])
def test_a_small_temperature_is_nearly_greedy(temperature):
    probabilities = distribution(make_sampler(temperature=temperature), PROBABILITIES.log())
    assert probabilities.tolist() == [0, 1, 0, 0, 0]


def test_a_large_temperature_is_nearly_uniform():
    sampler = make_sampler(temperature=100, min_tokens=1, stops=[1])
    probabilities = distribution(sampler, PROBABILITIES.log(), [])
    assert probabilities.tolist() == pytest.approx([0.25, 0, 0.25, 0.25, 0.25], abs=0.01)


def test_penalties_and_bias_are_added_to_logits():
    fields = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {0: 2.0, 3: -100}}
    sampler = make_sampler([1, 4], temperature=1.0, **fields)
    logits = PROBABILITIES.log()
    adjusted = logits + torch.tensor([2.0, 0, -0.25, -100, 0])
    torch.testing.assert_close(distribution(sampler, logits, [2]), adjusted.softmax(dim=0))
    # Two times token 2, once token 1; the prompt does not count.
    adjusted = logits + torch.tensor([2.0, -0.25, 0, -100, 0])
    torch.testing.assert_close(distribution(sampler, logits, [2, 1, 2]), adjusted.softmax(dim=0))


def test_low_precision_logits_are_sampled_in_fp32():
    logits = random_logits(0, 4096).bfloat16()
    sampler = make_sampler(vocab_size=4096, top_p=0.9)
    exact = distribution(sampler, logits.float(), [])
    assert distribution(sampler, logits, []).equal(exact)


def test_temperature_0_takes_the_best_of_what_is_left():
    sampler = make_sampler([3], [1], temperature=0.0, repetition_penalty=2.0, min_tokens=1)
    logits = torch.tensor([1.0, 9.0, 1.5, 2.5, -1.0])
    assert distribution(sampler, logits, []).tolist() == [0, 0, 1, 0, 0]
    assert distribution(sampler, logits, [2]).tolist() == [0, 1, 0, 0, 0]


# --- draws -----------------------------------------------------------------------------------


def drawn_tokens(sampler, logits, count):
    """Tokens of one row for many random numbers."""
    draws = [Draw(sampler, [], (), number) for number in range(count)]
    return [one.token for one in draw([logits] * count, draws)]


def test_draws_follow_the_limited_distribution():
    sampler = make_sampler(temperature=0.5, top_k=3)
    probabilities = distribution(sampler, PROBABILITIES.log())
    squared = PROBABILITIES.square() * torch.tensor([0, 1, 0, 1, 1])
    torch.testing.assert_close(probabilities, squared / squared.sum())
    tokens = drawn_tokens(sampler, PROBABILITIES.log(), 4000)
    share = torch.bincount(torch.tensor(tokens), minlength=5) / len(tokens)
    assert torch.allclose(share, probabilities, atol=0.03)


@pytest.mark.parametrize(
    "possible", [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], [1e-30, 1.0, 1e-30], [0.3] * 7]
)
def test_a_draw_is_never_of_an_impossible_token(monkeypatch, possible):
    sampler = make_sampler(vocab_size=len(possible) + 2)
    weights = torch.tensor([0.0, *possible, 0.0])
    for number in (0.0, 0.5, 1 - 2**-52):
        monkeypatch.setattr(sampler, "number", lambda index, number=number: number)
        assert weights[drawn_tokens(sampler, weights.log(), 1)[0]] > 0


def test_logits_of_which_none_is_allowed_give_no_token():
    nothing = torch.full((5,), -torch.inf)
    damaged = torch.tensor([0.0, torch.nan, 0, 0, 0])
    sampler = make_sampler()
    draws = [Draw(sampler, [], (), number) for number in range(3)]
    drawn = draw([nothing, PROBABILITIES.log(), damaged], draws)
    assert [one.token == 5 for one in drawn] == [True, False, True]


# --- many rows -------------------------------------------------------------------------------

TOKENS = st.integers(0, 8)
ROW_PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.0, 2.0, 100.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.6, 100.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.25, -1.0]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100, -0.5, 2.0, 100]), max_size=2),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 9, 50]),
        "top_p": st.sampled_from([1.0, 1.0, 1e-9, 0.5, 0.9]),
        "top_p_decay": st.sampled_from([1.0, 0.7]),
        "min_tokens": st.integers(0, 3),
        "seed": st.integers(0, 1000),
    }
)


@st.composite
def rows(draw):
    """A row of nine logits, often with ties and impossible tokens, a text, and perhaps a draft."""
    values = st.sampled_from([-torch.inf, -3.0, 0.0, 0.0, 1.0, 1.0, 2.5]) | st.floats(
        -40, 40, width=16
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = torch.tensor(draw(st.lists(values, min_size=9, max_size=9)), dtype=dtype)
    logits[draw(TOKENS)] = draw(st.floats(-5, 5, width=16))
    text = [draw(st.lists(TOKENS, max_size=4)) for _ in range(3)]
    other = draw(st.none() | st.lists(st.floats(-5, 5, width=16), min_size=9, max_size=9))
    return draw(ROW_PARAMS), logits.float(), text, other, draw(st.integers(0, 3))


@given(st.lists(rows(), min_size=1, max_size=6), st.sampled_from([9, 30, 2**17]))
def test_many_rows_are_what_each_is_alone(drawn_rows, host_numbers):
    """To the last bit, whatever the rows of a batch have in common."""
    expected, logits, draws = [], [], []
    for fields, row, (prompt, generated, behind), other, number in drawn_rows:
        stops = (2, 4)
        sampler = make_sampler(prompt, stops, 9, **{"max_tokens": 9} | fields)
        text = [*generated, *behind]
        target = reference_distribution(sampler.params, row, prompt, text, stops)
        numbers = [sampler.number(number), sampler.number(number + 1)]
        draft = None
        if other is not None:
            given = reference_distribution(sampler.params, torch.tensor(other), prompt, text, stops)
            token = reference_token(given, 0.4)
            draft = Draft(token, given if sampler.params.temperature else None)
            expected.append(reference_verification(target, given, token, *numbers))
        else:
            expected.append(reference_token(target, numbers[0]))
        if target.isnan().any():
            expected[-1] = 9
        logits.append(row)
        draws.append(Draw(sampler, generated, tuple(behind), number, draft, keeps=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_sampler, "_HOST_NUMBERS", host_numbers)
        found = draw(logits, draws)
    assert [one.token for one in found] == expected
    for one, row, (fields, _, (prompt, generated, behind), *_) in zip(
        found, logits, drawn_rows, strict=True
    ):
        if fields["temperature"]:
            params, text = one.draw.sampler.params, [*generated, *behind]
            alone = reference_distribution(params, row, prompt, text, (2, 4))
            assert one.probabilities is not None
            torch.testing.assert_close(one.probabilities, alone, rtol=0, atol=0, equal_nan=True)


# --- rejection sampling ----------------------------------------------------------------------


def residual(target, draft):
    """What a refused draft is replaced from, normalized."""
    wanted = Draw(make_sampler(), [], (), 0, Draft(0, draft))
    (missing,) = batch_sampler.compare_drafts(target[None], [wanted])[2]
    return missing / missing.sum()


def distributions(size):
    weights = st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any)
    return weights.map(lambda w: torch.tensor(w, dtype=torch.float32) / sum(w))


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(distributions(n), distributions(n))))
def test_keeping_or_replacing_gives_the_target_exactly(pair):
    """The probability of every token, added up over the draft: no draw, no chance of a miss."""
    target, draft = pair
    kept_share = torch.minimum(target, draft)
    refused = 1 - kept_share.sum()
    replacing = residual(target, draft)
    assert float(replacing.sum()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(kept_share + refused * replacing, target, rtol=0, atol=1e-6)
    if refused > 1e-6:
        assert (replacing[target <= draft] == 0).all()


def test_residual_of_equals_is_the_target():
    assert residual(PROBABILITIES, PROBABILITIES).equal(PROBABILITIES)


def test_speculated_tokens_are_distributed_as_the_target():
    """Pearson's chi-square of drafted, kept and replaced tokens, for one seed."""
    given = torch.tensor([0.5, 0.1, 0.2, 0.0, 0.2])
    sampler = make_sampler(seed=3)
    count = 20_000
    drafts = drawn_tokens(sampler, given.log(), count)
    draws = [
        Draw(sampler, [], (), count + 2 * place, Draft(token, given))
        for place, token in enumerate(drafts)
    ]
    tokens = [one.token for one in draw([PROBABILITIES.log()] * count, draws)]
    observed = torch.bincount(torch.tensor(tokens), minlength=5).double()
    expected = PROBABILITIES.double() * count
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # With 4 degrees of freedom, above 18.5 in one of a thousand seeds.
    assert chi_square < 18.5
