"""What requests may say: limits of the context, and what the model's name has already said."""

from __future__ import annotations

import json

import pytest

from tests.helpers.text_checkpoint import CONTEXT, save_text_checkpoint
from tests.helpers.text_server import NAME, text_server

COMPLETIONS, CHAT, API = "/v1/completions", "/v1/chat/completions", "/api"
PROMPT = [5] * 10
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with text_server(save_text_checkpoint(tmp_path_factory.mktemp("requests"))) as running:
        yield running


def refusal(server, path, body):
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(error["param"]), error
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("end", "fields", "param"),
    [
        ("lossless", {"early_exit_threshold": 0.3}, "early_exit_threshold"),
        ("lossless", {"early_exit_thres": 0.3}, "early_exit_thres"),
        ("lossless", {"exit_layers": [1]}, "exit_layers"),
        ("lossless", {"use_early_exit": True}, "use_early_exit"),
        ("lossless", {"mode": "full"}, "mode"),
        ("full", {"early_exit_threshold": 0.3}, "early_exit_threshold"),
        ("full", {"mode": "self_speculative"}, "mode"),
        ("exit=1", {"early_exit_threshold": 0.5}, "early_exit_threshold"),
        ("exit=1", {"exit_thresholds": [0.0]}, "exit_thresholds"),
        ("exit=1", {"exit_threshold_decay": 4}, "exit_threshold_decay"),
        ("lossless", {"exit_measure": "margin"}, "exit_measure"),
        ("threshold=0.3", {"exit_thresholds": [0.3, 0.3]}, "exit_thresholds"),
        ("exit=1", {"exit_layers": [3]}, "exit_layers"),
        ("exit=1", {"exit_layers": [1, 3]}, "exit_layers"),
        ("exit=1", {"use_early_exit": False}, "use_early_exit"),
        ("threshold=0.3", {"early_exit_thres": 0.4}, "early_exit_thres"),
        ("threshold=0.3", {"mode": "full"}, "mode"),
    ],
)
def test_no_field_contradicts_the_models_name(server, path, end, fields, param):
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    model = f"{NAME}:{end}"
    error = refusal(server, path, {**prompt, "max_tokens": 2, "model": model, **fields})
    assert error["param"] == param
    assert f"contradicts model '{model}'" in error["message"]


@pytest.mark.parametrize(
    ("end", "fields"),
    [
        ("lossless", {"mode": "self_speculative", "draft_exit_layer": 3}),
        ("full", {"use_early_exit": False}),
        ("exit=1", {"early_exit_threshold": 0, "exit_layers": [1]}),
        ("threshold=0.3", {"early_exit_thres": 0.3, "exit_layers": [3]}),
        ("threshold=0.3", {"exit_measure": "entropy", "exit_threshold_decay": 2.0}),
        ("exit=1", {"exit_measure": "margin", "exit_threshold_decay": 0}),
    ],
)
def test_fields_may_say_what_the_name_says(server, end, fields):
    body = {"prompt": PROMPT, "max_tokens": 2, "model": f"{NAME}:{end}", **fields}
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 200, response.text


LIMITS = [
    (COMPLETIONS, "max_tokens", {"prompt": [PROMPT, PROMPT[:3]]}),
    (CHAT, "max_tokens", {"messages": MESSAGES}),
    (CHAT, "max_completion_tokens", {"messages": MESSAGES}),
    (API, "tokens_to_generate", {"prompts": ["the", "the quick brown"]}),
]


@pytest.mark.parametrize(("path", "name", "prompt"), LIMITS)
def test_no_more_tokens_than_the_context_has_room_for(server, path, name, prompt):
    error = refusal(server, path, {**prompt, name: CONTEXT})
    assert (error["param"], error["code"]) == (name, "context_length_exceeded")
    room = int(error["message"].rsplit(" ", 1)[1])
    assert error["message"].startswith(f"{name} {CONTEXT}: does not fit behind a prompt of ")
    assert refusal(server, path, {**prompt, name: room + 1})["param"] == name
    response = server.post(path, {**prompt, name: room})
    assert response.status_code == 200, response.text


def test_where_no_limit_is_said_a_text_gets_what_fits(server):
    long = [5] * (CONTEXT - 3)
    body = {"prompt": long, "ignore_eos": True, "temperature": 0}
    assert server.post(COMPLETIONS, body).json()["usage"]["completion_tokens"] == 3
    body["prompt"] = PROMPT
    assert server.post(COMPLETIONS, body).json()["usage"]["completion_tokens"] == 16
    response = server.post(API, {"prompts": ["x" * (CONTEXT - 3)], "top_k": 1})
    assert response.status_code == 200, response.text
    # As harnesses ask: the longest prompt that one token fits behind.
    scores = {"max_tokens": 1, "echo": True, "logprobs": 1}
    response = server.post(COMPLETIONS, {"prompt": [5] * (CONTEXT - 1), **scores})
    assert response.status_code == 200, response.text
    error = refusal(server, COMPLETIONS, {"prompt": [5] * CONTEXT, **scores})
    assert error["code"] == "context_length_exceeded"


def test_no_tokens_at_all_are_for_scoring(server):
    error = refusal(server, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0})
    assert error["message"] == "max_tokens 0: gives nothing, allowed: 1 or more, or 0 with echo"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_event_of_a_stream_counts_the_tokens_until_then(server, path):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    body = {"max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    body |= {"prompt": "the", "messages": [{"role": "user", "content": "the"}]}
    del body["messages" if path == "/v1/completions" else "prompt"]
    lines = server.post(path, body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-2:] == [5, 5]
    assert len(set(counts)) > 1
    assert all(event["usage"]["prompt_tokens"] > 0 for event in events)
    assert all("obfuscation" in event for event in events)
