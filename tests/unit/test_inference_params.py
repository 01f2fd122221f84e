"""Requests outside their ranges are refused by name, value and range."""

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.tiny_models import LLAMA, make_model


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "1 or more"),
        ("temperature", -0.1, "0 or more"),
        ("temperature", float("nan"), "0 or more"),
        ("top_k", -1, "0 (no limit) or more"),
        ("top_p", 0.0, "above 0, up to 1"),
        ("top_p", 1.1, "above 0, up to 1"),
        ("seed", -1, "0 to 2**63 - 1"),
        ("mode", "fast", "full or early_exit"),
        ("early_exit_threshold", 1.01, "0 to 1"),
        ("early_exit_threshold", float("nan"), "0 to 1"),
    ],
)
def test_field_out_of_range(field, value, allowed):
    mode = {} if field == "mode" else {"mode": "early_exit"}
    with pytest.raises(ValueError, match=field) as error:
        SamplingParams(**mode, **{field: value})
    assert str(error.value) == f"{field} {value!r} is out of range, allowed: {allowed}"


@pytest.mark.parametrize("field", [{"early_exit_threshold": 0.5}, {"exit_layers": (1,)}])
def test_exits_are_not_for_the_full_mode(field):
    with pytest.raises(ValueError, match="allowed: None with mode='full'"):
        SamplingParams(**field)


def test_lists_are_taken_for_tuples():
    params = SamplingParams(mode="early_exit", exit_layers=[1, 2], stop_token_ids=[3])
    assert (params.exit_layers, params.stop_token_ids) == ((1, 2), (3,))
    assert params.threshold == 0.8


@pytest.fixture(scope="module")
def engine():
    return EarlyExitEngine(make_model(exits=(1, 3)).segmented)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "a prompt is empty"),
        ([[1], list(range(60)) + [1] * 4], "64 tokens is too long, allowed: up to 63"),
        ([[1, 61]], "token 61 is unknown, allowed: 0 to 60"),
        ([[1, -1]], "token -1 is unknown, allowed: 0 to 60"),
        ([[1.5]], "token 1.5 is unknown"),
        ("text", "allowed: lists of token ids"),
        (["text"], "allowed: lists of token ids"),
    ],
)
def test_prompt_is_refused(engine, prompts, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts)


def test_unknown_exits_are_refused_with_what_exists(engine):
    params = SamplingParams(mode="early_exit", exit_layers=(1, 2))
    with pytest.raises(ValueError, match="exit_layers 2 is unknown, allowed: 1, 3"):
        engine.generate([[1]], params)
    plain = EarlyExitEngine(make_model().segmented)
    with pytest.raises(ValueError, match="allowed: none, the model has no exits"):
        plain.generate([[1]], params)


def test_unknown_stop_token_is_refused(engine):
    with pytest.raises(ValueError, match="stop_token_ids 61 is out of range, allowed: 0 to 60"):
        engine.generate([[1]], SamplingParams(stop_token_ids=(LLAMA.vocab_size,)))


def test_a_stream_refuses_at_once(engine):
    with pytest.raises(ValueError, match="a prompt is empty"):
        engine.stream([])


def test_cap_on_pending_positions_is_checked():
    with pytest.raises(ValueError, match="max_pending 0 is out of range, allowed: 1 or more"):
        EarlyExitEngine(make_model().segmented, max_pending=0)
