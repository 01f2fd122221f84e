"""That a promise holds of a model: its own losses, and many calibrations on draws of its texts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron.early_exit.evaluation.choosing.fixed_sequence import level_of_path, num_proven
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value
from megatron.early_exit.evaluation.choosing.paths import paths_of
from megatron.early_exit.evaluation.choosing.wish import Wish, requirements_of
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.units import Unit
from megatron.early_exit.inference import EarlyExitEngine
from tests.helpers.text_tokenizers import make_tokenizer
from tests.helpers.tiny_models import LLAMA, make_model

CONFIDENCE, TEXTS, RUNS = 0.9, 40, 1000
ITEMS = tuple(Item("texts", f"def f{i}(x{i % 7}):") for i in range(30))


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What each text loses under each rule of a path: [rules, texts]."""
    model = make_model(replace(LLAMA, vocab_size=400), exits=(1, 3), use_exit_norm=True)
    tokenizer = make_tokenizer("sentencepiece", tmp_path_factory.mktemp("tokenizer"))
    engine = EarlyExitEngine(model.segmented, tokenizer, prefix_caching=False)
    settings = Settings(
        tasks=("texts",),
        thresholds=(0.9, 0.4, 0.0),
        measures=("max_probability",),
        kv_policies=("propagate",),
        exit_layers=((3,),),
        max_tokens=4,
    )
    (path,) = paths_of(settings)
    (requirement,) = requirements_of(Wish(agreement=0.5), ITEMS)
    measurement = Measurement(engine, ITEMS, settings)
    return np.array(
        [
            [
                requirement.loss(ITEMS[i], measurement.measure(Unit("untimed", i, rule), {}), None)
                for i in range(len(ITEMS))
            ]
            for rule in path.rules
        ]
    )


def test_the_models_rules_differ_in_what_they_lose(losses):
    means = losses.mean(axis=1)
    assert means[0] < 0.1
    assert means[-1] > 0.5
    assert ((losses >= 0) & (losses <= 1)).all()


def test_the_promise_holds_of_the_models_own_texts(losses):
    """The texts are all that there are, so the true risk of each rule is known."""
    risks = losses.mean(axis=1)
    riskiest = int(np.argmax(risks > 0.3))
    # The limit that tempts most: just below what a rule loses.
    limit = float(risks[riskiest]) - 1e-6
    generator, level, broken = np.random.default_rng(3), level_of_path(CONFIDENCE, 1), 0
    for _ in range(RUNS):
        draws = losses[:, generator.integers(losses.shape[1], size=TEXTS)]
        count = num_proven((p_value(Losses.of(row), limit) for row in draws), level)
        broken += count > 0 and risks[:count].max() > limit
    error = 1 - CONFIDENCE
    assert broken <= RUNS * error + 4 * math.sqrt(RUNS * error * (1 - error))
    # The same without a proof: what is lost on the drawn texts alone says little.
    rows = losses[riskiest][generator.integers(losses.shape[1], size=(RUNS, TEXTS))]
    assert (rows.mean(axis=1) < limit).mean() > 0.3
