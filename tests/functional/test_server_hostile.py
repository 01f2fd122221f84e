"""Bodies that nobody should send: each gets a 4xx that names the field, and the next is served."""

from __future__ import annotations

import http.client
import json
import socket
from urllib.parse import urlparse

import pytest

from megatron.early_exit.server.megatron_api.generate import GenerateRequest
from megatron.early_exit.server.openai.chat_models import ChatRequest
from megatron.early_exit.server.openai.completion_models import CompletionRequest
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import NAME, text_server

COMPLETIONS, CHAT, API = "/v1/completions", "/v1/chat/completions", "/api"
HUGE = 10**400


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = save_text_checkpoint(tmp_path_factory.mktemp("hostile"))
    with text_server(checkpoint, max_sequences=32) as running:
        yield running


def assert_serves(server):
    response = server.post(COMPLETIONS, {"prompt": "the", "max_tokens": 2, "temperature": 0})
    assert response.status_code == 200


def assert_refused(response, status=400, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
        assert param in error["message"]


def name_of(value):
    return str(value)[:40]


FIELDS = [
    *(("max_tokens", value) for value in (-1, "16", 1.5, True, HUGE, [1], {}, 0)),
    *(("temperature", value) for value in (-0.1, "1", True, [], 101)),
    *(("top_p", value) for value in (1.01, -1, "a", False)),
    *(("top_k", value) for value in (-2, 1.5, True, HUGE)),
    *(("n", value) for value in (0, -1, 17, 1.0, True, HUGE)),
    *(("logprobs", value) for value in (-1, 21, True, "1", 0.5)),
    *(("seed", value) for value in (HUGE, 2**64, -(2**63) - 1, True, 1.0)),
    *(("stop", value) for value in ("", [""], [1], 5, ["a"] * 17, {"a": 1}, [["a"]])),
    *(("stop_token_ids", value) for value in (5, [-1], [10**6], [True], [1] * 65)),
    *(("echo", value) for value in (1, "true", [])),
    *(("stream", value) for value in (1, "true", {})),
    *(("mode", value) for value in ("fast", 1, True, [])),
    *(("early_exit_threshold", value) for value in (-0.1, 1.1, 40, "0.8", True)),
    *(("exit_measure", value) for value in ("odds", 1, True, ["margin"])),
    *(("exit_thresholds", value) for value in ([0.5], [0.5, 2], ["0.5", 1], 0.5, [True, 1], [])),
    *(("exit_threshold_decay", value) for value in (-1, 101, "4", True)),
    *(("exit_layers", value) for value in (1, [2], ["1"], [-1], [True], [HUGE])),
    *(("draft_exit_layer", value) for value in (2, -1, "1", True)),
    *(("num_draft_tokens", value) for value in (0, -1, 1.5, HUGE)),
    *(("prompt", value) for value in (None, "", [], [[]], [""], 5, {}, [-1], [10**6], [1, "a"])),
    *(("prompt", value) for value in ([True], [[1], "a"], ["a" * 10**6], [1] * 10**4)),
    *(("frequency_penalty", value) for value in (2.5, "0", HUGE, True)),
    *(("logit_bias", value) for value in ({"5": 101}, {"-5": 1}, {"a": 1}, {"999": 1}, [], 5)),
    *(("best_of", value) for value in (2, 0)),
    ("exit_details", True),
    ("top_p_bound", 0.5),
    ("store", True),
    ("a" * 10**6, 1),
    ("suffix", "end"),
    ("repetition_penalty", 0),
    ("min_tokens", 17),
    ("min_p", 2),
    ("use_early_exit", "false"),
    ("model", 5),
    ("stream_options", {"include_usage": True}),
    ("user", 5),
    ("api_key", "x"),
    ("__class__", {}),
    ("__proto__", {"a": 1}),
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=name_of)
def test_a_field_that_is_not_right(server, name, value):
    body = {"prompt": "the", "max_tokens": 4, name: value}
    response = server.post(COMPLETIONS, body)
    assert_refused(response, param=name if len(name) < 80 else None)
    assert len(response.text) < 1000
    assert_serves(server)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("messages", value) for value in (None, [], "hi", [{}], [{"role": "user"}], [5])),
        ("messages", [{"role": "robot", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages", [{"role": "user", "content": "a", "extra": 1}]),
        ("messages", [{"role": "user", "content": "long " * 9999}]),
        ("messages", [{"role": "user", "content": None}]),
        ("max_tokens", 0),
        ("max_completion_tokens", 3),
        ("exit_details", True),
        ("top_logprobs", 2),
        ("logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("max_completion_tokens", 0),
    ],
    ids=name_of,
)
def test_a_conversation_that_is_not_right(server, name, value):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, name: value}
    assert_refused(server.post(CHAT, body))
    assert_serves(server)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("prompts", value) for value in (None, [], "a", [5], ["a"] * 129, [""], [["a"]])),
        *(("tokens_to_generate", value) for value in (-1, 0, 1.5, True, "4", HUGE)),
        *(("temperature", value) for value in (0, 101, "a", True)),
        *(("top_k", value) for value in (-1, 1001, 1.0)),
        *(("top_p", value) for value in (-0.1, 1.1)),
        *(("random_seed", value) for value in (-1, 1.5, HUGE)),
        *(("early_exit_thres", value) for value in (-1, 40, "a", True)),
        *(("use_early_exit", value) for value in (1, "yes")),
        ("max_len", 5),
        ("sentences", ["a"]),
    ],
    ids=name_of,
)
def test_a_request_to_api_that_is_not_right(server, name, value):
    body = {"prompts": ["the"], "tokens_to_generate": 2, name: value}
    response = server.post(API, body)
    assert_refused(response, param=name)
    # What Megatron's clients print.
    assert response.json()["message"] == response.json()["error"]["message"]
    assert_serves(server)


BODIES = {
    "nothing": b"",
    "no JSON": b"prompt=the",
    "half of it": b'{"prompt": "the"',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a text": b'"the"',
    "NaN": b'{"prompt": "the", "temperature": NaN}',
    "Infinity": b'{"prompt": "the", "temperature": Infinity}',
    "1e999": b'{"prompt": "the", "temperature": 1e999}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "a NUL": b'{"prompt": "the", "stop": ["\x00"]}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"prompt": "the", "logit_bias": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "a long number": b'{"prompt": "the", "seed": ' + b"9" * 5000 + b"}",
    "equal names": b'{"prompt": "the", "max_tokens": 1, "max_tokens": 2}',
    "many names, one of them twice": (
        b'{"prompt": "the", '
        + b"".join(b'"a%d": 0, ' % number for number in range(100_000))
        + b'"prompt": "the"}'
    ),
    "UTF-16": '{"prompt": "the"}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, API, "/tokenize", "/detokenize"])
def test_a_body_that_is_not_right(server, path, name):
    response = server.post(path, data=BODIES[name], headers={"Content-Type": "application/json"})
    assert_refused(response)
    assert_serves(server)


def test_a_body_that_cannot_be_read_is_told_in_one_sentence(server):
    json_type = {"Content-Type": "application/json"}
    for name, said in (
        ("no JSON", "the body is not JSON: expected value at line 1 column 1"),
        ("equal names", "the body has the name 'max_tokens' twice"),
    ):
        error = server.post(COMPLETIONS, data=BODIES[name], headers=json_type).json()["error"]
        assert error["message"] == said


def test_other_kinds_of_bodies(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/xml"):
        response = server.post(COMPLETIONS, data=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert_refused(response, 415)
    assert_serves(server)


def test_a_prompt_of_ten_megabytes(server):
    assert_refused(server.post(COMPLETIONS, {"prompt": "a" * 10_000_000}), 413, "body")
    assert_refused(server.post(COMPLETIONS, {"prompt": "a" * 3_000_000}), 400, "prompt")
    assert_serves(server)


def test_more_texts_than_allowed(server):
    assert_refused(server.post(COMPLETIONS, {"prompt": ["the"] * 17, "n": 2}), 400, "prompt")
    assert_serves(server)


def test_paths_and_methods(server):
    for path in ("/nowhere", "/static/../app.py", "/static/%2e%2e/app.py", "/static/", "/v1"):
        assert_refused(server.get(path), 404)
    place = urlparse(server.url)
    for path in ("/static/../app.py", "/static/..%2fapp.py", "//etc/passwd", "/static//etc/passwd"):
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=patient(30))
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status in (308, 404), path
        assert b"create_app" not in response.read()
    assert_refused(server.get(COMPLETIONS), 405)
    assert server.get(COMPLETIONS).headers["Allow"]
    assert_serves(server)


def test_headers_cannot_be_smuggled_in(server):
    name = f"{NAME}\r\nX-Injected: 1"
    response = server.post(COMPLETIONS, {"prompt": "the", "model": name})
    assert_refused(response, 404, "model")
    assert "X-Injected" not in response.headers
    response = server.get("/v1/models/a%0d%0aX-Injected:%201")
    assert_refused(response, 404)
    assert "X-Injected" not in response.headers
    assert_serves(server)


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.0 400 "),
        # As everything that is not HTTP/1.1.
        (b"GET /health HTTP/9.9\r\n\r\n", b"HTTP/1.0 200 "),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 400 ",
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 400 ",
        ),
        (b"GET / HTTP/1.1\r\nX: ".ljust(2**18 + 1, b"a"), b"HTTP/1.0 431 "),
    ],
    ids=["TLS", "version", "length", "two lengths", "long header"],
)
def test_requests_that_are_no_http(server, raw, answer):
    place = urlparse(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=patient(60)) as connection:
        connection.sendall(raw)
        assert connection.recv(64).startswith(answer)
    assert_serves(server)


def test_a_client_that_says_nothing_more_is_let_go(server):
    place = urlparse(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=patient(60)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n{"
        )
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(64) == b""
    assert_serves(server)


def test_null_is_the_same_as_nothing(server):
    nothing = server.post(COMPLETIONS, {"prompt": "the", "max_tokens": 2, "temperature": 0})
    body = {**dict.fromkeys(CompletionRequest.model_fields), "prompt": "the", "max_tokens": 2}
    response = server.post(COMPLETIONS, body | {"temperature": 0})
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == nothing.json()["choices"]
    chat = {**dict.fromkeys(ChatRequest.model_fields), "max_tokens": 2}
    said = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
        {"role": "user", "content": "b"},
    ]
    assert server.post(CHAT, chat | {"messages": said, "tools": []}).status_code == 200
    api = {**dict.fromkeys(GenerateRequest.model_fields), "prompts": ["the"]}
    assert server.post(API, api | {"tokens_to_generate": 2}).status_code == 200


def test_errors_are_json(server):
    response = server.post(COMPLETIONS, {"prompt": "the", "max_tokens": HUGE})
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(response.text)["error"]["type"] == "invalid_request_error"
    assert len(response.text) < 1000
