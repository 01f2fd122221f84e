"""What a request's fields mean on a server of a model with a stored rule."""

from __future__ import annotations

import pytest

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.server.bodies.fields import ExitFields
from megatron.early_exit.server.model_names import ServedModel
from megatron.early_exit.server.settings import ExitSettings
from tests.helpers.stored_rules import make_rule

FIELDS = make_rule().defaults()
BY_RULE = ExitSettings(mode="early_exit", **FIELDS, stored=frozenset([*FIELDS, "mode"]))
BY_FLAGS = ExitSettings(mode="early_exit", **FIELDS)


def asked(settings: ExitSettings = BY_RULE, *, only_scores: bool = False, **body: object):
    fields = ExitFields.model_validate(body).exit_params(settings, 2, only_scores=only_scores)
    return SamplingParams(max_tokens=1, **fields)


def of(params: SamplingParams, names=tuple(FIELDS)) -> dict[str, object]:
    return {name: getattr(params, name) for name in names}


def test_nothing_gets_the_rule():
    assert (asked().mode, of(asked())) == ("early_exit", FIELDS)


@pytest.mark.parametrize(
    "body", [{"draft_exit_layer": 1}, {"num_draft_tokens": 8}, {"draft_confidence": 0.5}]
)
def test_fields_of_drafts_mean_the_mode_that_drafts(body):
    assert asked(**body).mode == "self_speculative"
    with pytest.raises(ValueError, match="has no effect with mode='early_exit'"):
        asked(BY_FLAGS, **body)


def test_scores_alone_are_the_full_models_unless_a_mode_is_asked_for():
    assert asked(only_scores=True).mode == "full"
    assert asked(only_scores=True, mode="early_exit").mode == "early_exit"
    assert asked(BY_FLAGS, only_scores=True).mode == "early_exit"


def test_several_thresholds_are_of_all_exits():
    params = asked(exit_thresholds=[0.5, 0.6])
    assert (params.exit_thresholds, params.early_exit_threshold) == ((0.5, 0.6), None)
    assert (params.exit_layers, params.kv_policy) == (None, "propagate")
    # An operator's exits are those that the thresholds are of.
    assert asked(BY_FLAGS, exit_thresholds=[0.5]).exit_layers == (1,)


def test_stored_thresholds_are_of_their_exits_and_measure():
    each = {"early_exit_threshold": None, "exit_thresholds": (0.5, 0.25), "exit_layers": (1, 2)}
    stored = make_rule(**each).defaults()
    settings = ExitSettings(mode="early_exit", **stored, stored=frozenset([*stored, "mode"]))
    assert of(asked(settings), tuple(stored)) == stored
    for body in ({"early_exit_threshold": 0.7}, {"exit_layers": [2]}, {"exit_measure": "entropy"}):
        params = asked(settings, **body)
        assert params.exit_thresholds is None
        assert params.early_exit_threshold == body.get("early_exit_threshold", 0.8)
    assert asked(settings, kv_policy="exact").exit_thresholds == (0.5, 0.25)


def test_a_threshold_means_nothing_by_another_measure():
    assert asked(exit_measure="entropy").early_exit_threshold == 0.8
    assert asked(exit_measure="margin").early_exit_threshold == 0.25
    assert asked(BY_FLAGS, exit_measure="entropy").early_exit_threshold == 0.25


@pytest.mark.parametrize("mode", ["full", "self_speculative"])
def test_exact_caches_ask_for_nothing(mode):
    assert asked(ExitSettings(mode=mode), kv_policy="exact").mode == mode


@pytest.mark.parametrize("name", ["m:exit=2", "m:threshold=0.25", "m:full", "m:lossless"])
def test_a_name_means_the_same_whatever_is_stored(name):
    built_in = ExitSettings(mode="self_speculative")
    found = [ServedModel("m", own, (1, 2)).settings(name) for own in (BY_RULE, built_in)]
    assert found[0] == found[1]
