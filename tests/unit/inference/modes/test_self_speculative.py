"""Self-speculative decoding changes nothing: sampled tokens have the full model's distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.modes.draft_choice import DraftChoice, Drafter
from megatron.early_exit.inference.modes.draft_gain import DraftCosts, DraftGain, Readings
from megatron.early_exit.inference.modes.head_output import head_outputs
from megatron.early_exit.inference.modes.mode import MTP, Next, TokenSampler
from megatron.early_exit.inference.modes.rule import DraftRule, ExitRule
from megatron.early_exit.inference.modes.sampling import Sampler
from megatron.early_exit.inference.modes.self_speculative import SelfSpeculativeMode
from megatron.early_exit.inference.sequence import Sequence
from tests.helpers.row_sampling import distribution
from tests.helpers.tiny_models import make_model

MODEL = make_model(exits=(1, 3), use_exit_norm=True)
VOCAB, DRAWS = 5, 3000
COSTS = DraftCosts(ask=40.0, verify=70.0, full=100.0, rows=16.0)
DRAFT = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
TARGET = torch.tensor([0.0, 1.0, 1.5, -2.0, 0.5])
BEHIND = torch.tensor([[1.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0], [0, 0, 0.5, 0, 1]])
# Of a chi-square with 4 degrees of freedom, one in 100,000.
BOUND = 28.5


def chi_square(tokens: list[int], expected: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    wanted = expected.double() * len(tokens)
    possible = wanted > 0
    assert not counts[~possible].any()
    return float(((counts - wanted).square() / wanted.clamp(min=1e-12))[possible].sum())


def drafting_mode(
    params: SamplingParams,
    sampler: Sampler,
    max_drafts: int,
    least_confidence: float,
    drafter: int = 0,
    costs: DraftCosts = COSTS,
    *,
    adapts: bool = False,
) -> SelfSpeculativeMode:
    return SelfSpeculativeMode(
        TokenSampler(params, sampler, Sequence(0, []), (1, 2)),
        ExitRule((0,), (0.0,)),
        drafting=DraftRule(max_drafts, least_confidence),
        room=100,
        choice=DraftChoice({drafter: Drafter(costs, max_drafts)}),
        adapts=adapts,
        depths=max_drafts,
    )


def speculate(params: SamplingParams, drafter: int = 0) -> list[list[int]]:
    """The tokens of many rounds with two drafts each, of one request's random numbers."""
    sampler = Sampler(params, [], (), VOCAB)
    draft = head_outputs(DRAFT[None])[0]
    rounds = []
    for _ in range(DRAWS):
        mode = drafting_mode(params, sampler, 2, 0.0, drafter)
        assert mode.at_exit(drafter, draft, True) is Next.DRAFTED
        assert mode.at_exit(drafter, draft, True) is Next.DRAFTED
        assert mode.num_ahead == 0
        assert mode.at_exit(drafter, draft, True) is Next.DEEPER
        first, second = mode.sampler.sequence.drafts
        targets = [TARGET, BEHIND[first % 3], BEHIND[second % 3]]
        tokens = mode.at_end(head_outputs(torch.stack(targets)))
        assert mode.sampler.sequence.drafts == []
        rounds.append([token.token_id for token in tokens])
    return rounds


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.95}, {"min_p": 0.2}]
)
@pytest.mark.parametrize("drafter", [0, MTP], ids=["exit", "module"])
def test_sampled_tokens_have_the_full_models_distribution(options, drafter):
    params = SamplingParams(
        **{"mode": "self_speculative", "temperature": 1.0, "seed": 3, "max_tokens": 100, **options}
    )
    full = Sampler(params, [], (), VOCAB)
    rounds = speculate(params, drafter)
    first = [tokens[0] for tokens in rounds]
    assert chi_square(first, distribution(full, TARGET)) < BOUND
    for token in range(VOCAB):
        # Behind an accepted draft comes what the full model gives behind that very token.
        second = [tokens[1] for tokens in rounds if tokens[0] == token and len(tokens) > 1]
        if len(second) > 200:
            assert chi_square(second, distribution(full, BEHIND[token % 3], [token])) < BOUND
    assert {len(tokens) for tokens in rounds} == {1, 2, 3}


def test_the_bound_would_notice():
    params = SamplingParams(mode="self_speculative", temperature=1.0, seed=3, max_tokens=100)
    first = [tokens[0] for tokens in speculate(params)]
    assert chi_square(first, DRAFT.softmax(0)) > 10 * BOUND


def sampled(mode: str, seed: int, **options: object) -> SamplingParams:
    return SamplingParams(mode=mode, max_tokens=8, temperature=1.0, seed=seed, **options)


@settings(max_examples=25)
@given(
    prompts=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6), min_size=2, max_size=5),
    mode=st.sampled_from(["full", "early_exit", "self_speculative"]),
    slots=st.integers(1, 4),
)
def test_a_seed_gives_the_same_text_in_any_batch(prompts, mode, slots):
    params = [sampled(mode, seed) for seed in range(len(prompts))]
    engine = EarlyExitEngine(MODEL.segmented, max_batch_size=slots)
    together = [result.token_ids for result in engine.generate(prompts, params)]
    alone = [engine.generate([p], own)[0].token_ids for p, own in zip(prompts, params, strict=True)]
    assert together == alone


def test_drafts_follow_what_is_accepted():
    params = SamplingParams(mode="self_speculative", max_tokens=100)
    sampler = Sampler(SamplingParams(), [], (), VOCAB)
    mode = drafting_mode(params, sampler, 4, 0.0)
    agreeing, other = head_outputs(torch.stack((DRAFT, TARGET)))

    def drafts_of_a_round(ends: list[bool]) -> int:
        while mode.at_exit(0, agreeing, True) is Next.DRAFTED:
            pass
        count = len(mode.sampler.sequence.drafts)
        mode.at_end([agreeing if ends[i] else other for i in range(count + 1)])
        return count

    assert drafts_of_a_round([False] * 9) == 4
    assert drafts_of_a_round([True] * 9) == 1
    assert drafts_of_a_round([True] * 9) == 2
    assert drafts_of_a_round([True, False] * 9) == 3
    assert drafts_of_a_round([True] * 9) == 2


def test_an_unsure_exit_does_not_draft():
    params = SamplingParams(mode="self_speculative", draft_confidence=0.99, max_tokens=100)
    sampler = Sampler(params, [], (), VOCAB)
    mode = drafting_mode(params, sampler, 4, 0.99)
    assert mode.at_exit(0, head_outputs(DRAFT[None])[0], True) is Next.DEEPER
    assert mode.sampler.sequence.drafts == []


def test_questions_in_vain_are_on_the_account():
    params = SamplingParams(mode="self_speculative", draft_confidence=0.99, max_tokens=100)
    mode = drafting_mode(params, Sampler(params, [], (), VOCAB), 4, 0.99, MTP)
    (unsure,) = head_outputs(DRAFT[None])
    expected = DraftGain(COSTS)
    expected.add(4, [], 0)
    assert mode.at_exit(MTP, unsure, True) is Next.DEEPER
    mode.waste(3)
    mode.at_end([unsure])
    assert mode.choice.gain.speed == expected.speed < 1


@pytest.mark.parametrize("drafter", [0, MTP], ids=["exit", "module"])
def test_nobody_is_asked_for_a_draft_that_would_not_pay_even_if_it_were_sure(drafter):
    params = SamplingParams(mode="self_speculative", max_tokens=100)
    sampler = Sampler(params, [], (), VOCAB)
    (sure,) = head_outputs(torch.tensor([[9.0, 0, 0, 0, 0]]))

    def mode_with(**readings: float) -> SelfSpeculativeMode:
        costs = replace(COSTS, ask=4.0, readings=Readings(**readings))
        return drafting_mode(params, sampler, 2, 0.0, drafter, costs, adapts=True)

    # A third row takes longer than a step of the full model.
    mode = mode_with(several=3.0)
    assert mode.asks(0) or drafter == MTP
    assert mode.at_exit(drafter, sure, True) is Next.DRAFTED
    assert mode.num_ahead == 0
    assert not mode.asks(0)
    expected = DraftGain(replace(COSTS, ask=4.0, readings=Readings(several=3.0)))
    expected.add(1, [sure.confidence], 1)
    mode.at_end([sure, sure])
    assert mode.choice.gain.total == expected.total
    # Where it takes hardly any time, a second draft is asked for.
    mode = mode_with()
    assert mode.at_exit(drafter, sure, True) is Next.DRAFTED
    assert mode.num_ahead == (drafter == MTP)
    assert mode.at_exit(drafter, sure, True) is Next.DRAFTED


def test_drafts_end_where_one_of_them_is_likely_to_be_wrong():
    logits = torch.full((VOCAB,), -20.0)
    logits[:2] = torch.log(torch.tensor([0.6, 0.4]))
    params = SamplingParams(mode="self_speculative", max_tokens=100)
    sampler = Sampler(params, [], (), VOCAB)
    mode = drafting_mode(params, sampler, 9, 0.2)
    (sure, other) = head_outputs(torch.stack((logits, TARGET)))
    # 0.6 ** 3 = 0.216, and 0.6 ** 4 = 0.13: also behind drafts that were not accepted.
    for _ in range(2):
        while mode.at_exit(0, sure, True) is Next.DRAFTED:
            pass
        assert len(mode.sampler.sequence.drafts) == 3
        mode.at_end([other] * 4)
