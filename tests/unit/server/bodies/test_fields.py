"""What the server says to each field that OpenAI's and vLLM's clients may send."""

from __future__ import annotations

import json
import re
import string
from typing import Annotated

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import TypeAdapter, ValidationError

from megatron.early_exit.ranges import ABOVE_ZERO, BELOW_ONE, ZERO_TO_ONE
from megatron.early_exit.server.bodies.ranges import InRange
from megatron.early_exit.server.bodies.stream_options import StreamOptions, with_options
from megatron.early_exit.server.http.errors import ApiError
from megatron.early_exit.server.megatron_api.generate import GenerateRequest
from megatron.early_exit.server.openai.chat_models import ChatRequest
from megatron.early_exit.server.openai.completion_models import CompletionRequest

USER = {"role": "user", "content": "hi"}
BASES = {
    CompletionRequest: {"prompt": "the"},
    ChatRequest: {"messages": [USER]},
    GenerateRequest: {"prompts": ["the"]},
}
BOTH = (CompletionRequest, ChatRequest)
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("kind", "params"), [(CompletionRequest, CompletionParams), (ChatRequest, ChatParams)]
)
def test_every_field_of_openai_is_known(kind, params):
    known = kind.model_fields.keys() | kind.unsupported.keys()
    assert params.__annotations__.keys() <= known
    assert not kind.model_fields.keys() & kind.unsupported.keys()


HARMLESS = {
    CompletionRequest: {"suffix": "", "best_of": 1, "add_special_tokens": False},
    ChatRequest: {
        "tools": [],
        "functions": [],
        "tool_choice": "auto",
        "function_call": "none",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "reasoning_effort": "none",
        "verbosity": "medium",
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "chat_template_kwargs": {},
        "web_search_options": None,
    },
}
HARMLESS_IN_BOTH = {
    "service_tier": "auto",
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "response_format": {"type": "text"},
    "guided_json": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "skip_special_tokens": True,
    "priority": 0,
    "vllm_xargs": {},
}


@pytest.mark.parametrize("kind", BOTH)
def test_what_asks_for_nothing_is_accepted(kind):
    body = {**BASES[kind], **HARMLESS_IN_BOTH, **HARMLESS[kind], "stream": True}
    body["stream_options"] = {"include_obfuscation": False, "continuous_usage_stats": False}
    assert kind.model_validate(body).sampling_params() == (
        kind.model_validate(BASES[kind]).sampling_params()
    )
    for name in kind.unsupported:
        kind.model_validate({**BASES[kind], name: None})


REFUSED = [
    (CompletionRequest, "suffix", "end", "fills no gaps"),
    (CompletionRequest, "prompt_embeds", ["x"], "texts or token ids"),
    *((kind, "store", True, "keeps no answers") for kind in BOTH),
    *((kind, "store", 0, "keeps no answers") for kind in BOTH),
    *((kind, "service_tier", "flex", "one tier") for kind in BOTH),
    *((kind, "guided_regex", "a*", "grammar") for kind in BOTH),
    *((kind, "response_format", {"type": "json_object"}, "schema") for kind in BOTH),
    *((kind, "use_beam_search", True, "beam search") for kind in BOTH),
    *((kind, "prompt_logprobs", 1, "echo and logprobs") for kind in BOTH),
    *((kind, "truncate_prompt_tokens", 5, "not cut") for kind in BOTH),
    (ChatRequest, "tools", [TOOL], "this server has no function calling"),
    (ChatRequest, "tool_choice", "required", "this server has no function calling"),
    (ChatRequest, "functions", [{"name": "f"}], "this server has no function calling"),
    (ChatRequest, "modalities", ["text", "audio"], "text alone"),
    (ChatRequest, "reasoning_effort", "high", "thoughts"),
    (ChatRequest, "web_search_options", {}, "searches nothing"),
    (ChatRequest, "prediction", {"type": "content", "content": "a"}, "self_speculative"),
    (ChatRequest, "audio", {"voice": "ash", "format": "wav"}, "text alone"),
]


@pytest.mark.parametrize(("kind", "name", "value", "reason"), REFUSED)
def test_what_is_not_supported_is_refused_in_a_sentence(kind, name, value, reason):
    with pytest.raises(ApiError, match=f"^{name} is not supported here: .*{reason}") as raised:
        kind.model_validate({**BASES[kind], name: value})
    assert raised.value.status == 400
    error = raised.value.body.error
    assert (error.param, error.code) == (name, "unsupported")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages: content of type image_url is not supported here: messages are texts",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [TOOL]},
            "messages: tool_calls is not supported here: this server has no function calling",
        ),
    ],
)
def test_messages_are_texts(message, said):
    with pytest.raises(ApiError) as raised:
        ChatRequest.model_validate({"messages": [USER, message]})
    assert str(raised.value) == said
    assert raised.value.body.error.param == "messages"


ALPHABET = {*string.ascii_letters, *string.digits, "-", "_"}


def test_obfuscated_events_have_lengths_in_blocks():
    texts = ("x" * 100, "\u00e9\u8bed\u8a00", "one\u2028two")
    events = ['{"a":1}', *(f'{{"text":"{text}"}}' for text in texts)]
    options = StreamOptions(include_obfuscation=True)
    for event, filled in zip(events, with_options(iter(events), options), strict=True):
        assert len(filled.encode()) % 64 == 0
        assert len(filled.splitlines()) == 1
        parsed = json.loads(filled)
        assert set(parsed.pop("obfuscation")) <= ALPHABET
        assert parsed == json.loads(event)
    plain = list(with_options(iter(events), StreamOptions()))
    assert [json.loads(event) for event in plain] == [json.loads(event) for event in events]
    assert all(len(event.splitlines()) == 1 for event in plain)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"top_p": 0}, {"temperature": 0.0}),
        ({"top_p": 0, "temperature": 1}, {"temperature": 0.0}),
        ({"top_k": -1}, {}),
        ({"seed": -1}, {}),
        ({"seed": -2}, {"seed": 2**63 - 2}),
        ({"seed": 2**64 - 1}, {"seed": 2**63 - 1}),
        ({"temperature": -0.0}, {"temperature": 0.0}),
    ],
)
def test_values_that_have_a_meaning_of_their_own(given, meant):
    plain = CompletionRequest.model_validate({"prompt": "a"}).sampling_params()
    params = CompletionRequest.model_validate({"prompt": "a", **given}).sampling_params()
    assert params == {**plain, **meant}


RANGES = {
    ("temperature", "a number, 0 to 100"): (-1, 101, "1", True, []),
    ("top_p", "a number, 0 to 1"): (-0.1, 2, False),
    ("top_k", "an integer, -1 to 2**63 - 1"): (-2, 1.5, 10**400),
    ("min_p", "a number, 0 (no limit) to 1"): (2,),
    ("repetition_penalty", "a number, above 0, up to 100"): (0, -1),
    ("presence_penalty", "a number, -2 to 2"): (3,),
    ("seed", "an integer, -2**63 to 2**64 - 1"): (2**70, 1.0),
    ("n", "an integer, 1 to 16"): (0, 17, True),
    ("num_draft_tokens", "an integer, 1 to 1024"): (0,),
    ("early_exit_threshold", "a number, 0 to 1"): (40,),
}


@pytest.mark.parametrize(
    ("name", "allowed", "value"),
    [(*key, value) for key, values in RANGES.items() for value in values],
)
@pytest.mark.parametrize("kind", BOTH)
def test_a_number_out_of_its_range_is_told_the_range(kind, name, allowed, value):
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({**BASES[kind], name: value})
    (error,) = raised.value.errors()
    assert error["loc"] == (name,)
    assert error["msg"] == f"Value error, allowed: {allowed}"


@pytest.mark.parametrize("kind", BASES)
def test_the_document_has_both_ends_of_every_number(kind):
    schema = kind.model_json_schema()
    for name, field in schema["properties"].items():
        for one in field.get("anyOf", [field]):
            if one.get("type") in ("integer", "number"):
                assert "maximum" in one, name
                assert {"minimum", "exclusiveMinimum"} & one.keys(), name


@pytest.mark.parametrize("kind", BOTH)
def test_a_field_that_nobody_knows_is_refused_even_if_it_is_null(kind):
    kind.model_validate({**BASES[kind], "seed": None})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({**BASES[kind], "sead": None})


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (BELOW_ONE, (0.0, 0.99), (1.0, -0.1)),
        (ABOVE_ZERO, (0.1, 1e9), (0.0, -1.0)),
        (ZERO_TO_ONE, (0.0, 1.0), (1.1, -0.1)),
    ],
)
def test_a_body_has_the_ends_of_the_range(allowed, inside, outside):
    field = TypeAdapter(Annotated[float, InRange(allowed)])
    assert [field.validate_python(number) for number in inside] == list(inside)
    for number in outside:
        with pytest.raises(ValidationError, match=re.escape(f"allowed: a number, {allowed}")):
            field.validate_python(number)
