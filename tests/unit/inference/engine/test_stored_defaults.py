"""What a request gets of a stored rule: what it does not say itself."""

from __future__ import annotations

import argparse
import logging

import pytest

from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.stored_rule import described_without_rule, store_rule
from megatron.early_exit.evaluation.command_line import add_measured_engine_flags, load
from megatron.early_exit.evaluation.lm_eval_model import EarlyExitLM
from megatron.early_exit.evaluation.rule import Rule
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.engine.stored_defaults import with_stored_rule
from tests.helpers.stored_rules import make_rule
from tests.helpers.text_checkpoint import save_text_checkpoint

RULE = make_rule(early_exit_threshold=0.0)
TEXT = "the quick brown foxes"


def resolved(rule=RULE, **fields):
    return with_stored_rule(SamplingParams(**fields), rule)


def test_a_request_without_a_mode_is_the_stored_rules():
    found = resolved(max_tokens=3)
    assert (found.mode, found.early_exit_threshold, found.exit_measure) == (
        "early_exit",
        0.0,
        "margin",
    )
    assert (found.exit_layers, found.kv_policy, found.max_tokens) == ((1,), "propagate", 3)


def test_without_a_rule_it_is_the_full_models():
    assert resolved(None).mode == "full"
    assert resolved(None, mode="early_exit").early_exit_threshold is None


@pytest.mark.parametrize(
    "fields",
    [
        {"early_exit_threshold": 0.5},
        {"exit_measure": "margin"},
        {"exit_layers": (3,)},
        {"kv_policy": "exact"},
    ],
)
def test_each_field_of_a_request_comes_before_the_rules(fields):
    found = resolved(mode="early_exit", **fields)
    for name, stored in RULE.defaults().items():
        assert getattr(found, name) == fields.get(name, stored)


def test_stored_thresholds_are_of_their_exits_and_measure():
    each = {"early_exit_threshold": None, "exit_thresholds": (0.5, 0.25), "exit_layers": (1, 3)}
    rule = make_rule(**each)
    assert resolved(rule).exit_thresholds == (0.5, 0.25)
    for fields in (
        {"early_exit_threshold": 0.7},
        {"exit_layers": (3,)},
        {"exit_measure": "entropy"},
    ):
        found = resolved(rule, mode="early_exit", **fields)
        assert found.exit_thresholds is None
        assert found.early_exit_threshold == fields.get("early_exit_threshold")


def test_several_thresholds_come_before_the_rules_one_and_are_of_all_exits():
    found = resolved(mode="early_exit", exit_thresholds=(0.5, 0.5))
    assert (found.early_exit_threshold, found.exit_thresholds) == (None, (0.5, 0.5))
    assert (found.exit_layers, found.kv_policy) == (None, "propagate")


def test_a_threshold_means_nothing_by_another_measure():
    found = resolved(mode="early_exit", exit_measure="entropy")
    assert (found.exit_measure, found.early_exit_threshold) == ("entropy", None)


def test_scores_alone_are_the_full_models():
    assert resolved(max_tokens=0, prompt_logprobs=0).mode == "full"
    assert resolved(max_tokens=1, prompt_logprobs=0).mode == "early_exit"


@pytest.mark.parametrize("mode", ["full", "self_speculative"])
def test_another_mode_has_nothing_of_the_rule(mode):
    assert resolved(mode=mode) == SamplingParams(mode=mode)


def test_a_request_to_be_told_of_exits_is_the_full_models():
    assert resolved(exit_layers=(1,), exit_details=True).mode == "full"


def test_the_engine_answers_by_what_is_stored_with_its_weights(tmp_path, caplog):
    path = save_text_checkpoint(tmp_path)
    name = locate(path).iteration_dir.name
    before = described_without_rule(path)

    def depths(**options) -> set[int]:
        engine = EarlyExitEngine.from_checkpoint(path, max_batch_size=1, **options)
        return set(engine.generate([TEXT])[0].exit_layers)

    store_rule(path, make_rule(name, early_exit_threshold=0.0), before)
    engine = EarlyExitEngine.from_checkpoint(path, max_batch_size=1)
    assert set(engine.generate([TEXT])[0].exit_layers) == {1}
    full = SamplingParams(mode="full", ignore_eos=True)
    (result,) = engine.generate([TEXT], full)
    assert set(result.exit_layers) == {engine.num_layers}
    deeper = SamplingParams(mode="early_exit", exit_layers=(3,))
    assert set(engine.generate([TEXT], deeper)[0].exit_layers) == {3}
    # What the full model finds best is asked of the full model.
    tokens = result.prompt_token_ids
    assert engine.argmax_tokens(tokens)[-1] == result.token_ids[0]
    with caplog.at_level(logging.WARNING):
        assert depths(weight_dtype="int8") == {engine.num_layers}
    assert "is not used: it was found in fp32, and this is fp32, weights in int8" in caplog.text
    store_rule(path, make_rule("iter_0000001", early_exit_threshold=0.0), before)
    with caplog.at_level(logging.WARNING):
        assert depths() == {engine.num_layers}
    assert f"found of iter_0000001, and this is {name}" in caplog.text


def test_what_measures_a_model_has_nothing_of_the_stored_rule(tmp_path):
    path = save_text_checkpoint(tmp_path)
    rule = make_rule(locate(path).iteration_dir.name, exit_layers=(3,), early_exit_threshold=0.0)
    store_rule(path, rule, described_without_rule(path))
    parser = argparse.ArgumentParser()
    add_measured_engine_flags(parser)
    measured = load(parser.parse_args(["--load", str(path), "--no-compile"]))
    harness = EarlyExitLM.create_from_arg_string(f"load={path}").engine
    # Its exits and its measure are all and the model's, which the rule does not change.
    for engine in (measured, harness):
        (result,) = engine.generate([TEXT], Rule(0.0).params(max_tokens=4))
        assert set(result.exit_layers) == {1}
        assert set(engine.generate([TEXT])[0].exit_layers) == {engine.num_layers}
        # Who wants to know can still see it.
        assert engine.stored_rule == rule
