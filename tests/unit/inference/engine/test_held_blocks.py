"""An exit's block sees a position that is held as it is held, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.policy import SegmentQueue
from tests.helpers.tiny_models import HEADS, LLAMA, make_model

MODEL = make_model(
    replace(LLAMA, num_layers=5), exits=(1, 2, 4), seed=1, use_exit_gate=True, **HEADS["block"]
)
TEXT = [(7 * place * place + place) % 61 for place in range(30)]


class RandomPolicy:
    """Runs batches as far as a coin says, so that exits are asked late."""

    def __init__(self, coins: random.Random) -> None:
        self._coins = coins

    def choose(self, queues: Sequence[SegmentQueue], through: int | None = None) -> range:
        last = len(queues) - 1
        starts = range(len(queues) if through is None else through + 1)
        start = next(index for index in starts if queues[index].count)
        return range(start, (last if self._coins.random() < 0.7 else max(start, through or 0)) + 1)


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_nobody_else_changes_a_text(seed):
    coins = random.Random(seed)
    engine = EarlyExitEngine(
        MODEL.segmented, max_batch_size=4, max_pending=coins.choice([1, 2, 3]), prefix_caching=False
    )
    engine.loop.scheduler._policy = RandomPolicy(coins)
    prompts, params = [], []
    for policy, firsts in (("propagate", [0.5, 0.55, 0.6, 0.65]), ("exact", [0.0, 0.4])):
        for _ in range(2):
            start = coins.randint(0, 20)
            prompts.append(TEXT[start : start + coins.choice([3, 7])])
            thresholds = (coins.choice(firsts), coins.choice([0.4, 0.5, 0.6]), 0.6)
            params.append(
                SamplingParams(
                    mode="early_exit",
                    max_tokens=40,
                    exit_measure="gate",
                    exit_thresholds=thresholds,
                    kv_policy=policy,
                )
            )
    together = engine.generate(prompts, params)
    for prompt, one, found in zip(prompts, params, together, strict=True):
        (alone,) = EarlyExitEngine(MODEL.segmented, max_batch_size=1).generate([prompt], one)
        assert found.token_ids == alone.token_ids
        assert found.exit_layers == alone.exit_layers
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-3)
