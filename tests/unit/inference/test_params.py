"""Requests outside their ranges are refused by name, value and range."""

import itertools

import pytest

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.tiny_models import LLAMA, make_model

HUGE = 10**400


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "0 (only with echo or prompt_logprobs) or more"),
        ("max_tokens", -1, "0 (only with echo or prompt_logprobs) or more"),
        ("min_tokens", -1, "0 to 16 (max_tokens)"),
        ("min_tokens", 17, "0 to 16 (max_tokens)"),
        ("temperature", -0.1, "0 to 100"),
        ("temperature", float("nan"), "0 to 100"),
        ("temperature", float("inf"), "0 to 100"),
        ("temperature", HUGE, "0 to 100"),
        ("repetition_penalty", 0, "above 0, up to 100"),
        ("repetition_penalty", float("nan"), "above 0, up to 100"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", float("nan"), "-2 to 2"),
        ("logit_bias", ((1, 101),), "pairs of a token and a number, -100 to 100"),
        ("logit_bias", ((-1, 1),), "pairs of a token and a number, -100 to 100"),
        ("logit_bias", ((1,),), "pairs of a token and a number, -100 to 100"),
        ("min_p", -0.1, "0 (no limit) to 1"),
        ("min_p", 1.1, "0 (no limit) to 1"),
        ("top_k", -1, "0 (no limit) or more"),
        ("top_p", 0.0, "above 0, up to 1"),
        ("top_p", 1.1, "above 0, up to 1"),
        ("top_p_decay", 0.0, "above 0, up to 1 (off)"),
        ("top_p_decay", 1.5, "above 0, up to 1 (off)"),
        ("top_p_bound", -0.5, "0 to 1.0 (top_p)"),
        ("top_p_bound", 1.5, "0 to 1.0 (top_p)"),
        ("seed", -1, "0 to 2**63 - 1"),
        ("seed", 2**63, "0 to 2**63 - 1"),
        ("stop", ("end", ""), "texts of 1 character or more"),
        ("stop", (1,), "texts of 1 character or more"),
        ("stop", None, "texts of 1 character or more"),
        ("stop_token_ids", (1, -1), "integers, 0 or more"),
        ("stop_token_ids", (1.0,), "integers, 0 or more"),
        ("stop_token_ids", 7, "integers, 0 or more"),
        ("ignore_eos", 1, "True or False"),
        ("echo", "yes", "True or False"),
        ("exit_details", None, "True or False"),
        ("logprobs", -1, "0 or more"),
        ("prompt_logprobs", -1, "0 or more"),
        ("mode", "fast", "full or early_exit or self_speculative"),
        ("early_exit_threshold", 1.01, "0 to 1"),
        ("early_exit_threshold", float("nan"), "0 to 1"),
        ("exit_measure", "odds", "max_probability or margin or entropy or similarity or gate"),
        ("exit_measure", 1, "max_probability or margin or entropy or similarity or gate"),
        ("exit_thresholds", (0.5, 1.5), "None, or numbers, 0 to 1"),
        ("exit_thresholds", ("0.5",), "None, or numbers, 0 to 1"),
        ("exit_thresholds", 0.5, "None, or numbers, 0 to 1"),
        ("exit_threshold_decay", -1, "0 (off) to 100"),
        ("exit_threshold_decay", float("nan"), "0 (off) to 100"),
        ("exits_pay_at", -1, "0 (off) to 1024"),
        ("kv_policy", "lazy", "exact or propagate"),
        ("exit_layers", (-1,), "None, or integers, 0 or more"),
        ("exit_layers", ("2",), "None, or integers, 0 or more"),
        ("num_draft_tokens", 0, "1 to 1024"),
        ("draft_exit_layer", -2, "0 or more"),
        ("draft_confidence", 1.5, "0 (off) to 1"),
    ],
)
def test_field_out_of_range(field, value, allowed):
    mode = {} if field == "mode" else {"mode": "early_exit"}
    with pytest.raises(ValueError, match=field) as error:
        SamplingParams(**mode, **{field: value})
    assert str(error.value) == f"{field} {value!r} is out of range, allowed: {allowed}"


COUNTS = ("max_tokens", "min_tokens", "top_k", "num_draft_tokens")
NO_COUNTS = (1.5, 2.0, "3", True, float("nan"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product((*COUNTS, "seed", "logprobs"), NO_COUNTS),
        *((field, None) for field in COUNTS),
    ],
)
def test_what_counts_is_an_integer(field, value):
    with pytest.raises(ValueError, match="allowed: ") as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field} {value!r} is not an integer, allowed: ")


@pytest.mark.parametrize("value", ["0.5", False, (0.5,)])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "early_exit_threshold"])
def test_what_is_measured_is_a_number(field, value):
    with pytest.raises(ValueError, match="allowed: ") as error:
        SamplingParams(mode="early_exit", **{field: value})
    assert str(error.value).startswith(f"{field} {value!r} is not a number, allowed: ")


@pytest.mark.parametrize(
    ("mode", "field", "value", "needed"),
    [
        ("full", "early_exit_threshold", 0.5, "early_exit"),
        ("full", "exit_layers", (1,), "early_exit"),
        ("full", "num_draft_tokens", 3, "self_speculative"),
        ("early_exit", "draft_exit_layer", 2, "self_speculative"),
        ("early_exit", "draft_confidence", 0.5, "self_speculative"),
        ("full", "exit_measure", "margin", "early_exit"),
        ("full", "exits_pay_at", 1, "early_exit"),
        ("full", "exit_thresholds", (0.5,), "early_exit"),
        ("self_speculative", "exit_threshold_decay", 4.0, "early_exit"),
        ("self_speculative", "exit_measure", "max_probability", "early_exit"),
        ("self_speculative", "early_exit_threshold", 0.5, "early_exit"),
        ("self_speculative", "exit_layers", (1,), "early_exit"),
    ],
)
def test_a_field_without_effect_in_the_mode_is_refused(mode, field, value, needed):
    with pytest.raises(ValueError, match=field) as error:
        SamplingParams(mode=mode, **{field: value})
    assert str(error.value) == (
        f"{field} {value!r} has no effect with mode={mode!r}, allowed: with mode={needed!r}"
    )


def test_exits_may_be_chosen_to_look_at():
    assert SamplingParams(exit_layers=(1,), exit_details=True).exit_layers == (1,)
    with pytest.raises(ValueError, match=r"exit_layers \(1,\) .* mode='self_speculative'"):
        SamplingParams(mode="self_speculative", exit_layers=(1,), exit_details=True)


def test_there_is_one_threshold_or_one_for_each_exit():
    params = SamplingParams(mode="early_exit", exit_thresholds=[0.5, 1])
    assert params.exit_thresholds == (0.5, 1)
    with pytest.raises(ValueError, match="exit_thresholds") as error:
        SamplingParams(mode="early_exit", exit_thresholds=(0.5, 1), early_exit_threshold=0.8)
    assert str(error.value) == (
        "exit_thresholds (0.5, 1) cannot be combined with early_exit_threshold 0.8, "
        "allowed: one of the two"
    )


def test_drafting_is_set_up():
    params = SamplingParams(
        mode="self_speculative", num_draft_tokens=2, draft_exit_layer=3, draft_confidence=1
    )
    assert (params.num_draft_tokens, params.draft_exit_layer, params.draft_confidence) == (2, 3, 1)


@pytest.mark.parametrize("scored", [{"echo": True}, {"prompt_logprobs": 0}])
def test_scoring_needs_no_token(scored):
    assert SamplingParams(max_tokens=0, **scored).max_tokens == 0


def test_lists_are_taken_for_tuples():
    params = SamplingParams(
        mode="early_exit", exit_layers=[1, 2], stop_token_ids=[3], stop=["a", "b"]
    )
    assert (params.exit_layers, params.stop_token_ids) == ((1, 2), (3,))
    assert params.stop == ("a", "b")
    assert params.threshold == 0.8


def test_one_stop_string_may_stand_alone():
    assert SamplingParams(stop="end").stop == ("end",)


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
    with pytest.raises(ValueError, match="stop_token_ids 61 is unknown, allowed: 0 to 60"):
        engine.generate([[1]], SamplingParams(stop_token_ids=(LLAMA.vocab_size,)))


def test_a_stream_refuses_at_once(engine):
    with pytest.raises(ValueError, match="a prompt is empty"):
        engine.stream([])


def test_cap_on_pending_positions_is_checked():
    with pytest.raises(ValueError, match="max_pending 0 is out of range, allowed: 1 or more"):
        EarlyExitEngine(make_model().segmented, max_pending=0)


@pytest.mark.parametrize("mode", [None, "full", "self_speculative"])
def test_exact_caches_ask_for_nothing_in_other_modes(mode):
    assert SamplingParams(mode=mode, kv_policy="exact").kv_policy == "exact"
    with pytest.raises(ValueError, match="kv_policy 'propagate' has no effect with mode="):
        SamplingParams(mode=mode, kv_policy="propagate")
