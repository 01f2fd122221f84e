"""What answers leave undone, against what the engine has waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.early_exit.evaluation.catch_up import (
    catch_up_seconds,
    num_waiting,
    waiting_tokens,
)
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.modes.early_exit import EarlyExitMode
from tests.helpers.tiny_models import LLAMA, make_model

MAX_PENDING = 5
PROMPT = [7, 11, 13]


@pytest.fixture(scope="module")
def engine() -> EarlyExitEngine:
    model = make_model(replace(LLAMA, vocab_size=400), exits=(1, 3), use_exit_norm=True)
    return EarlyExitEngine(model.segmented, prefix_caching=False, max_pending=MAX_PENDING)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 3])
def test_as_many_positions_wait_as_the_engine_says(engine, prompt, monkeypatch):
    pending: list[int] = []
    start = EarlyExitMode.start

    def spy(mode: EarlyExitMode, num_pending: int) -> None:
        pending.append(num_pending)
        start(mode, num_pending)

    monkeypatch.setattr(EarlyExitMode, "start", spy)
    rule = Rule(0.0)
    (answer,) = engine.generate([prompt], rule.params(max_tokens=16, ignore_eos=True))
    layers = answer.exit_layers
    assert set(layers) == {1}
    # The engine has what waits before a token.
    found = [num_waiting(layers[:end], len(prompt), 8, MAX_PENDING) for end in range(16)]
    assert found == pending
    assert max(found) >= MAX_PENDING
    computed = [*prompt, *answer.token_ids[:-1]]
    for end in (1, 2, 16):
        waiting = waiting_tokens(prompt, answer.token_ids[:end], layers[:end], rule, engine)
        count = num_waiting(layers[:end], len(prompt), 8, MAX_PENDING)
        assert waiting == computed[len(prompt) + end - 1 - count : len(prompt) + end - 1]


def test_a_token_of_the_final_head_leaves_nothing():
    assert num_waiting([2, 2, 8], 10, 8, 64) == 0
    assert num_waiting([2, 2, 8, 2], 10, 8, 64) == 1
    assert num_waiting([2, 4, 2], 10, 8, 64) == 12
    # The second token takes a long prompt through all layers.
    assert num_waiting([2, 2, 2], 100, 8, 64) == 1


def test_what_waits_costs_time_with_exact_caches_alone(engine):
    for rule in (FULL, Rule(0.0, "propagate")):
        assert waiting_tokens(PROMPT, [1, 2], [1, 1], rule, engine) == []
    assert waiting_tokens(PROMPT, [1, 2], [1, 1], Rule(0.0), engine) == [*PROMPT, 1]
    assert catch_up_seconds(engine, [[], []]) == 0
    assert catch_up_seconds(engine, [[], PROMPT]) > 0
