"""lm-eval's model in this process: its arguments, long texts, and what tasks may ask for."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megatron.early_exit.evaluation.lm_eval_model import NAME, EarlyExitLM
from megatron.early_exit.evaluation.rule import Rule
from megatron.early_exit.evaluation.scoring import score
from megatron.early_exit.inference import EarlyExitEngine
from tests.helpers.text_checkpoint import save_text_checkpoint

TEXT = "pack my box with five dozen liquor jugs " * 6
LENGTH = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return EarlyExitEngine.from_checkpoint(checkpoint, max_sequence_length=LENGTH)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_harness_knows_it(checkpoint, device):
    """The latter is what it says if nobody has said anything."""
    model = get_model(NAME).create_from_arg_string(
        f"load={checkpoint},early_exit_threshold=0.5,exit_layers=1+3,dtype=fp32",
        {"batch_size": 4, "max_batch_size": 8, "device": device},
    )
    assert model.rule == Rule(threshold=0.5, exit_layers=(1, 3))
    assert model.engine.max_batch_size == 8


@pytest.mark.parametrize("rule", [Rule(), Rule(threshold=0.2)])
def test_long_texts_are_scored_in_windows(engine, rule):
    model = EarlyExitLM(engine, rule)
    tokens = engine.tokenizer.encode(TEXT)
    assert len(tokens) > 2 * LENGTH
    # Each token once, behind the one before it; the last ones behind as many as there is room for.
    whole, size = [engine.eod_id, *tokens], LENGTH - 1
    expected = 0.0
    for first in range(0, len(tokens), size):
        end = min(first + size, len(tokens))
        start = first if end < len(tokens) else len(whole) - LENGTH
        scores = score(engine, whole[start : end + 1], rule)
        expected += sum(one.logprob for one in scores[first - start :])
    (found,) = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", (TEXT,)), disable_tqdm=True
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_contexts_are_cut_on_the_left(engine):
    model = EarlyExitLM(engine)
    (found,) = model.loglikelihood(instances("loglikelihood", (TEXT, " jugs")), disable_tqdm=True)
    whole = engine.tokenizer.encode(TEXT + " jugs")
    count = len(whole) - len(engine.tokenizer.encode(TEXT.rstrip()))
    scores = score(engine, whole[-LENGTH:])[-count:]
    assert found[0] == pytest.approx(sum(one.logprob for one in scores), abs=1e-4)


def test_what_tasks_ask_for(engine):
    model = EarlyExitLM(engine)
    (answer,) = model.generate_until(
        instances("generate_until", (TEXT, {"until": "o", "max_gen_toks": 4, "do_sample": False})),
        disable_tqdm=True,
    )
    assert "o" not in answer
    for settings, message in (
        ({"num_beams": 4}, "generation_kwargs num_beams 4 is not supported"),
        ({"max_gen_toks": LENGTH}, f"max_gen_toks {LENGTH} leaves no room for a prompt"),
    ):
        asked = instances("generate_until", (TEXT, settings))
        with pytest.raises(ValueError, match=message):
            model.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("load=CHECKPOINT,pretrained=x", "--model_args pretrained: unknown, allowed: load, early"),
        ("early_exit_threshold=0.5", "--model_args load: missing"),
        ("load=CHECKPOINT,kv_policy=exact", "kv_policy has no effect without early_exit_threshold"),
        ("load=CHECKPOINT,early_exit_threshold=0.5,kv_policy=x", "kv_policy 'x', allowed: exact"),
        ("load=CHECKPOINT,early_exit_threshold=0.5,exit_layers=a", "exit_layers 'a', allowed: num"),
        ("load=CHECKPOINT,early_exit_threshold=2", "early_exit_threshold 2"),
        (
            "load=CHECKPOINT,early_exit_threshold=high",
            "early_exit_threshold 'high', allowed: a num",
        ),
        ("load=CHECKPOINT,max_batch_size=2.5", "max_batch_size 2.5, allowed: a whole number"),
        ("load=CHECKPOINT,compile=1", "compile 1, allowed: true or false"),
        ("load=CHECKPOINT,dtype=float", "dtype 'float', allowed: fp32, bf16, fp16"),
    ],
)
def test_arguments_that_cannot_be_used(checkpoint, arguments, message):
    text = arguments.replace("CHECKPOINT", str(checkpoint))
    with pytest.raises(ValueError, match=message):
        EarlyExitLM.create_from_arg_string(text)
