"""The server's endpoints over a real socket, against the engine asked directly."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.server_process import wait_until
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import CONTEXT, EXITS, VOCAB_SIZE, save_text_checkpoint
from tests.helpers.text_server import NAME, text_server

PROMPT = "the 7 quick brown"
GREEDY = {"temperature": 0, "ignore_eos": True}
LONG = {"prompt": PROMPT, "max_tokens": 200, **GREEDY}
BUFFER_BYTES = 2**13


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return EarlyExitEngine.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint):
    with text_server(checkpoint, example_prompts=("def main():",)) as running:
        yield running


def events(response):
    """The events of a stream, without the mark of its end, which has to be there."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"].startswith("text/event-stream")
    lines = [line for line in response.content.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def complete(server, **body):
    response = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_is_the_engines_text(server, engine):
    for mode in ("full", "early_exit", "self_speculative"):
        params = SamplingParams(max_tokens=24, mode=mode, ignore_eos=True)
        (expected,) = engine.generate(PROMPT, params)
        answer = complete(server, max_tokens=24, mode=mode, logprobs=0)
        (choice,) = answer["choices"]
        assert choice["text"] == expected.text
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["exit_layers"] == expected.exit_layers
        assert choice["logprobs"]["confidences"] == pytest.approx(expected.confidences, abs=1e-5)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
        count = len(expected.prompt_token_ids)
        cached = (count - 1) // 16 * 16
        assert answer["usage"] == {
            "prompt_tokens": count,
            "completion_tokens": 24,
            "total_tokens": count + 24,
            "prompt_tokens_details": {"cached_tokens": cached if mode != "full" else 0},
        }
        metrics = answer["metrics"]
        assert metrics["mode"] == mode
        assert sum(metrics["exit_tokens"].values()) == 24
        mean = sum(expected.exit_layers) / 24
        assert metrics["mean_exit_layer"] == pytest.approx(mean)
        assert (metrics["speculative_decoding"] is not None) == (mode == "self_speculative")


def test_positions_that_leave_are_held_where_that_is_asked_for(server, engine):
    leaving = {"early_exit_threshold": 0.5, "kv_policy": "propagate"}
    params = SamplingParams(max_tokens=24, mode="early_exit", ignore_eos=True, **leaving)
    (expected,) = engine.generate(PROMPT, params)
    answer = complete(server, max_tokens=24, **leaving)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["metrics"]["kv_policy"] == "propagate"
    (exact,) = engine.generate(PROMPT, replace(params, kv_policy="exact"))
    assert exact.logprobs != expected.logprobs
    body = {"prompts": [PROMPT], "tokens_to_generate": 24, "top_k": 1, "echo_prompts": False}
    theirs = {**body, "use_early_exit": True, "early_exit_thres": 0.5, "kv_policy": "propagate"}
    assert server.post("/api", theirs).json()["text"] == [expected.text]
    refused = server.post("/v1/completions", {"prompt": PROMPT, "mode": "full", **leaving})
    assert refused.status_code == 400
    lazy = server.post("/v1/completions", {"prompt": PROMPT, "kv_policy": "lazy"})
    assert lazy.status_code == 400
    assert "kv_policy" in lazy.text


def test_drafts_are_counted(server):
    found = complete(server, max_tokens=32, mode="self_speculative", draft_confidence=0.0)
    counts = found["metrics"]["speculative_decoding"]
    accepted = found["metrics"]["exit_tokens"].get(str(EXITS[0]), 0)
    assert counts["num_accepted_draft_tokens"] == accepted
    assert counts["num_draft_tokens"] >= accepted
    assert counts["num_spec_steps"] >= 32 - 1 - accepted
    assert 1 <= counts["mean_acceptance_length"] <= 5


def test_the_default_is_lossless(server):
    assert complete(server, max_tokens=8)["metrics"]["mode"] == "self_speculative"
    cards = server.get("/v1/models").json()["data"]
    modes = {card["id"]: card["default_mode"] for card in cards}
    assert modes == {
        NAME: "self_speculative",
        f"{NAME}:full": "full",
        f"{NAME}:lossless": "self_speculative",
        f"{NAME}:threshold=0.8": "early_exit",
        **{f"{NAME}:exit={layer}": "early_exit" for layer in EXITS},
    }
    card = server.get(f"/v1/models/{NAME}:threshold=0.25").json()
    assert (card["max_model_len"], card["num_layers"]) == (CONTEXT, 4)
    assert card["example_prompts"] == ["def main():"]


def test_names_choose_the_exits(server):
    for layer in EXITS:
        answer = complete(server, model=f"{NAME}:exit={layer}", max_tokens=8)
        assert answer["metrics"]["exit_tokens"] == {str(layer): 8}
    answer = complete(server, model=f"{NAME}:threshold=1e-1", max_tokens=4)
    assert answer["metrics"]["early_exit_threshold"] == 0.1
    assert complete(server, model=f"{NAME}:full", max_tokens=4)["metrics"]["mode"] == "full"
    for name in ("other", f"{NAME}:exit=2", f"{NAME}:threshold=1.5", f"{NAME}:", f"{NAME}:x"):
        response = server.post("/v1/completions", {"prompt": "a", "model": name})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_requests_choose_measure_and_thresholds(server, engine):
    fields = {
        "exit_measure": "entropy",
        "exit_thresholds": [0.2, 0.1],
        "exit_threshold_decay": 4.0,
    }
    params = SamplingParams(
        mode="early_exit",
        exit_measure="entropy",
        exit_thresholds=(0.2, 0.1),
        exit_threshold_decay=4.0,
        max_tokens=12,
        ignore_eos=True,
        exit_details=True,
    )
    (result,) = engine.generate(PROMPT, params)
    body = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, **fields}
    answer = complete(server, **body, prompt=PROMPT, logprobs=0)
    assert answer["choices"][0]["logprobs"]["exit_layers"] == result.exit_layers
    assert answer["choices"][0]["logprobs"]["confidences"] == pytest.approx(result.confidences)
    metrics = answer["metrics"]
    assert {name: metrics[name] for name in fields} == fields
    assert metrics["early_exit_threshold"] is None
    asked = {"prompts": [PROMPT], "tokens_to_generate": 12, "top_k": 1, **fields}
    (expected,) = engine.generate([PROMPT], replace(params, ignore_eos=False))
    answer = server.post("/api", {**asked, "print_max_prob": True}).json()
    assert answer["exit_layers"] == [expected.exit_layers]
    found = [head["confidence"] for heads in answer["max_probs"][0] for head in heads]
    told = [head.confidence for heads in expected.heads for head in heads]
    assert found == pytest.approx(told)


def test_a_stream_is_the_whole_text_in_pieces(server):
    body = {"max_tokens": 24, "logprobs": 2, "n": 2, "echo": True, "exit_details": True}
    body |= {"prompt": [PROMPT, "lazy dogs"], "temperature": 0.8, "seed": 5, "ignore_eos": True}
    whole = complete(server, **body)
    stream = server.post(
        "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    *pieces, last = events(stream)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["metrics"]["exit_tokens"] == whole["metrics"]["exit_tokens"]
    for index, choice in enumerate(whole["choices"]):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own][-1] == choice["finish_reason"]
        assert all(piece["finish_reason"] is None for piece in own[:-1])
        for name, values in choice["logprobs"].items():
            found = [value for piece in own for value in piece["logprobs"][name]]
            assert found == values, name
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 4


def test_a_harness_can_score_texts(server, engine):
    ids = engine.tokenizer.encode("the 3 quick brown foxes jump")
    body = {"prompt": [ids, ids[:5]], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1}
    for name, params in {
        f"{NAME}:full": {"mode": "full"},
        f"{NAME}:exit=1": {
            "mode": "early_exit",
            "early_exit_threshold": 0.0,
            "exit_layers": (1,),
        },
    }.items():
        answer = complete(server, **body, model=name)
        for choice, own in zip(answer["choices"], body["prompt"], strict=True):
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values() if values} == {len(own) + 1}
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["top_logprobs"][0] is None
            for place in range(1, len(own) + 1):
                before = own[:place] if place < len(own) else own
                (result,) = engine.generate(
                    [before], SamplingParams(max_tokens=1, logprobs=VOCAB_SIZE, **params)
                )
                scores = dict(result.top_logprobs[0])
                token = own[place] if place < len(own) else result.token_ids[0]
                value = logprobs["token_logprobs"][place]
                assert value == pytest.approx(scores[token], abs=1e-4)
                best = max(logprobs["top_logprobs"][place].values())
                assert best == pytest.approx(max(scores.values()), abs=1e-4)
                # A harness finds out by equality whether a token is the most probable one.
                assert (best == value) == (token == result.token_ids[0])


def test_scores_alone(server):
    answer = complete(server, max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert "".join(choice["logprobs"]["tokens"]) == PROMPT
    assert answer["usage"]["completion_tokens"] == 0


def test_offsets_are_places_in_the_text(server):
    prompt = "a — é 日本 the"
    answer = complete(server, prompt=prompt, echo=True, logprobs=0, max_tokens=12)
    (choice,) = answer["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    count = answer["usage"]["prompt_tokens"]
    assert logprobs["text_offset"][count] == len(prompt)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<")):
            assert text[offset:].startswith(token), (token, offset)


def test_parts_of_characters_have_names_of_their_own(server):
    answer = complete(server, prompt="日 the", echo=True, logprobs=20, max_tokens=8)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert logprobs["text_offset"][:4] == [0, 0, 0, 1]
    assert all(len(best) >= 20 for best in logprobs["top_logprobs"][1:])
    assert "\ufffd" not in "".join(name for best in logprobs["top_logprobs"][1:] for name in best)


def test_tokens_of_a_conversation_have_their_bytes(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    response = server.post("/v1/chat/completions", body)
    content = response.json()["choices"][0]["logprobs"]["content"]
    for place in content:
        best = place["top_logprobs"]
        assert len({one["token"] for one in best}) == 20
        for one in (place, *best):
            if one["token"].startswith("bytes:"):
                shown = b"".join(bytes([byte]) for byte in one["bytes"])
                assert one["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in shown)
            elif one["bytes"] is not None:
                assert bytes(one["bytes"]).decode() == one["token"]
    assert any(one["token"].startswith("bytes:") for p in content for one in p["top_logprobs"])
    assert any(one["bytes"] is not None for one in content)


def test_the_largest_seed_has_successors(server):
    body = {"seed": 2**63 - 1, "n": 2, "temperature": 1.0, "max_tokens": 4}
    assert len(complete(server, **body)["choices"]) == 2


def test_the_speed_of_a_request_counts_its_waiting(server, monkeypatch):
    step = server.worker.engine.step
    monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.01) or step())
    begin = time.perf_counter()
    answer = complete(server, n=16, mode="full", temperature=1.0, max_tokens=20)
    seconds = time.perf_counter() - begin
    metrics = answer["metrics"]
    assert metrics["time_to_first_token_seconds"] + metrics["decode_seconds"] <= seconds
    # Four at a time, and 20 steps for each four: no answer's own time is that of all.
    assert metrics["decode_seconds"] > 0.01 * 4 * 19
    speed = (16 * 20 - 1) / metrics["decode_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(speed)


def test_events_have_one_line(server):
    prompt = "a\u2028b\u0085c\u2029d"
    response = server.post(
        "/v1/completions", {"prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
    )
    assert not set("\u2028\u0085\u2029") & set(response.content.decode())
    assert "".join(event["choices"][0]["text"] for event in events(response)).startswith(prompt)


def test_an_engine_that_hangs_does_not_make_clients_hang(checkpoint, monkeypatch):
    with text_server(checkpoint, request_timeout=0.2) as server:
        step, released = server.worker.engine.step, threading.Event()
        monkeypatch.setattr(server.worker.engine, "step", lambda: released.wait() and step())
        try:
            assert server.post("/v1/completions", LONG).status_code == 504
        finally:
            released.set()


class ReadsLittle(HTTPAdapter):
    """Connections for which the system keeps few bytes that have not been read."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the connections, with a small receive buffer each."""
        small = (socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        # Set before the connection is made: the window is agreed on then.
        options["socket_options"] = [*HTTPConnection.default_socket_options, small]
        super().init_poolmanager(*arguments, **options)


def test_what_is_not_read_holds_no_thread(checkpoint):
    body = {**LONG, "max_tokens": 30, "n": 3, "logprobs": 20, "exit_details": True, "stream": True}
    before = threading.active_count()
    settings = {"max_waiting": 1, "send_buffer_bytes": BUFFER_BYTES}
    with text_server(checkpoint, **settings) as server, requests.Session() as session:
        session.mount("http://", ReadsLittle())
        unread = []
        # More answers than the server has threads of any kind.
        for _ in range(threading.active_count() - before + 1):
            unread.append(session.post(f"{server.url}/v1/completions", json=body, stream=True))
            wait_until(lambda: server.worker.num_running + server.worker.num_waiting == 0)
        assert complete(server, max_tokens=1)
        for response in unread:
            # More than both buffers hold, which the system makes twice as large as asked.
            assert len(response.content) > 2 * 2 * 2 * BUFFER_BYTES
            choices = [choice for event in events(response) for choice in event["choices"]]
            assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 3 * 30


def test_what_an_exit_never_answers_is_a_number(tmp_path):
    few = save_text_checkpoint(tmp_path, exit_vocab_size=100)
    with text_server(few) as server:
        body = {"prompt": [[5, VOCAB_SIZE - 1, 7]], "max_tokens": 1, "echo": True, "logprobs": 1}
        answer = complete(server, **body, model=f"{NAME}:exit=1")
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][1] == -9999.0
        assert -50 < logprobs["token_logprobs"][2] < 0
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True}
        response = server.post(
            "/v1/chat/completions", {**chat, "model": f"{NAME}:exit=1", "top_logprobs": 20}
        )
        assert response.status_code == 200


def test_what_ends_a_text(server, engine):
    (free,) = engine.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True))
    stop = free.text[8:10]
    choice = complete(server, max_tokens=24, stop=stop)["choices"][0]
    assert choice["text"] == free.text[: free.text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    token = free.token_ids[6]
    choice = complete(server, max_tokens=24, stop_token_ids=[token], return_token_ids=True)
    choice = choice["choices"][0]
    assert choice["token_ids"] == free.token_ids[: free.token_ids.index(token) + 1]
    assert choice["prompt_token_ids"] == free.prompt_token_ids


def test_penalties_and_bias_change_the_text(server):
    free = complete(server, max_tokens=12, return_token_ids=True)["choices"][0]["token_ids"]
    banned = {str(free[0]): -100}
    body = {"max_tokens": 12, "return_token_ids": True, "logit_bias": banned}
    assert free[0] not in complete(server, **body)["choices"][0]["token_ids"]
    body = {"max_tokens": 60, "return_token_ids": True, "frequency_penalty": 2}
    body |= {"presence_penalty": 2.0}
    penalized = complete(server, **body)["choices"][0]["token_ids"]
    whole = complete(server, max_tokens=60, return_token_ids=True)["choices"][0]["token_ids"]
    assert len(set(penalized)) > len(set(whole))


def test_a_conversation_is_its_template(server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "jump over"}]}]
    body = {"messages": messages, "max_completion_tokens": 12, **GREEDY}
    answer = server.post(
        "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 2}
    ).json()
    expected = complete(server, prompt="user: jump over\nassistant:", max_tokens=12, logprobs=2)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected["choices"][0]["text"],
    }
    content = choice["logprobs"]["content"]
    logprobs = expected["choices"][0]["logprobs"]
    assert [one["token"] for one in content] == logprobs["tokens"]
    assert [one["exit_layer"] for one in content] == logprobs["exit_layers"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    stream = events(server.post("/v1/chat/completions", {**body, "stream": True}))
    deltas = [event["choices"][0]["delta"] for event in stream]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] or "" for delta in deltas) == choice["message"]["content"]
    assert stream[-1]["choices"][0]["finish_reason"] == "length"
    refused = server.post("/v1/chat/completions", {"messages": [{"role": "tool", "content": "4"}]})
    assert refused.status_code == 400
    assert "there are no tools" in refused.json()["error"]["message"]


def test_a_template_may_raise_anything(server, monkeypatch):
    def refuse(messages):
        raise ZeroDivisionError

    tokenizer = server.worker.engine.tokenizer
    monkeypatch.setattr(tokenizer._tokenizer, "apply_chat_template", lambda *_, **__: refuse(_))
    body = {"messages": [{"role": "user", "content": "a"}]}
    refused = server.post("/v1/chat/completions", body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


def test_the_servers_default_reaches_every_protocol(checkpoint):
    with text_server(checkpoint, mode="early_exit") as server:
        body = {"prompts": [PROMPT], "tokens_to_generate": 4, "early_exit_thres": 0.0, "top_k": 1}
        found = server.post("/api", {**body, "exit_layers": [1]}).json()
        assert found["exit_layers"] == [[1] * 4]
        off = server.post("/api", {**body, "use_early_exit": False}).json()
        assert off["exit_layers"] == [[4] * 4]


def test_what_clients_of_ee_llm_send(server, engine):
    body = {
        "prompts": [PROMPT],
        "tokens_to_generate": 12,
        "top_k": 1,
        "logprobs": True,
        "random_seed": 77,
        "echo_prompts": False,
        "early_exit_thres": 1,
        "exit_layers": [],
    }
    url = f"{server.url}/api"
    answer = requests.put(url, json=body, timeout=patient(60)).json()
    eos = {"ignore_eos": False}
    (full,) = engine.generate(PROMPT, SamplingParams(max_tokens=12, **eos))
    assert answer["text"] == [full.text]
    assert answer["logprobs"][0] == pytest.approx(full.logprobs, abs=1e-4)
    assert answer["requst_time"] == answer["request_time"] > 0
    assert answer["max_probs"] is None
    off = requests.put(url, json={**body, "use_early_exit": False}, timeout=patient(60)).json()
    assert off["text"] == [full.text]
    on = {**body, "use_early_exit": True, "early_exit_thres": 0, "exit_layers": [3]}
    on |= {"print_max_prob": True, "echo_prompts": True}
    answer = requests.post(url, json=on, timeout=patient(60)).json()
    assert set(answer["exit_layers"][0]) == {3}
    assert answer["text"][0].startswith(PROMPT)
    assert "".join(answer["segments"][0]).startswith(PROMPT)
    assert [head["layer"] for head in answer["max_probs"][0][0]] == [3]
    assert len(answer["logprobs"][0]) == len(answer["tokens"][0]) - 1
    for name, value in {
        "beam_width": 2,
        "length_penalty": 1.0,
        "stop_token": 2,
        "prevent_newline_after_colon": True,
        "top_p": 0.5,
        "early_exit_thres": 40,
    }.items():
        refused = requests.put(url, json={**body, name: value}, timeout=patient(60))
        assert refused.status_code == 400, name
        assert refused.json()["error"]["param"] == name
    begun = {"prompts": [""], "add_BOS": True, "tokens_to_generate": 2}
    assert requests.put(url, json=begun, timeout=patient(60)).json()["tokens"][0][0] == 1


def test_tokens_and_back(server, engine):
    text = "five dozen — liqueur"
    answer = server.post("/tokenize", {"prompt": text}).json()
    assert answer["tokens"] == engine.tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json()["prompt"] == text
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>")
    assert "assistant:" in info["chat_template"]


def metrics(server):
    lines = [line for line in server.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_figures(server):
    complete(server, max_tokens=5, model=f"{NAME}:exit=1")
    figures = metrics(server)
    assert figures["early_exit:generation_tokens_total"] >= 5
    assert figures['early_exit:exit_tokens_total{layer="1"}'] >= 5
    assert figures["early_exit:num_requests_running"] == 0
    assert figures["early_exit:time_to_first_token_seconds_count"] >= 1
    assert figures["early_exit:e2e_request_latency_seconds_count"] >= 1
    assert figures['early_exit:http_answers_total{status="200"}'] >= 1
    name = "early_exit:inter_token_latency_seconds"
    buckets = [figures[f'{name}_bucket{{le="{end}"}}'] for end in ("0.001", "1.0", "+Inf")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == figures[f"{name}_count"] >= 4
    assert 0 < figures[f"{name}_sum"] / buckets[-1] < 5
    complete(server, max_tokens=20, mode="self_speculative", draft_confidence=0)
    figures = metrics(server)
    drafted = figures["early_exit:spec_decode_num_draft_tokens_total"]
    assert drafted >= figures["early_exit:spec_decode_num_accepted_tokens_total"]
    assert drafted > 0
    assert figures["early_exit:kv_cache_usage_perc"] == 0
    complete(
        server, prompt="A prompt of many more tokens than a page of the caches has.", max_tokens=2
    )
    complete(
        server, prompt="A prompt of many more tokens than a page of the caches had.", max_tokens=2
    )
    figures = metrics(server)
    hits = figures["early_exit:prefix_cache_hits_total"]
    assert 16 <= hits < figures["early_exit:prefix_cache_queries_total"]
    assert figures["early_exit:num_preemptions_total"] == 0
    assert server.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_counts_tokens(server, caplog, stream):
    caplog.set_level(logging.INFO)
    body = {"prompt": [[5, 6, 7], [8]], "n": 2, "max_tokens": 3, **GREEDY, "stream": stream}
    own = {"X-Request-Id": f"counted-{stream}"}
    assert server.post("/v1/completions", body, headers=own).status_code == 200

    def lines() -> list[dict[str, object]]:
        told = [one.fields for one in caplog.records if one.message == "request"]
        return [one for one in told if one["request_id"] == own["X-Request-Id"]]

    # It is written when the answer is out, and that of another test's request may come before.
    wait_until(lambda: bool(lines()))
    (line,) = lines()
    assert (line["prompt_tokens"], line["completion_tokens"]) == (4, 12)


def test_a_client_that_goes_away_frees_its_place(server):
    response = server.post("/v1/completions", {**LONG, "n": 4, "stream": True}, stream=True)
    next(response.iter_content(16))
    assert server.worker.num_running > 0
    response.close()
    wait_until(lambda: server.worker.num_running == 0)
    cancelled = server.get("/metrics").text
    assert 'request_success_total{finished_reason="cancelled"}' in cancelled


def test_too_many_are_turned_away(checkpoint, monkeypatch):
    with text_server(checkpoint, max_batch_size=1, max_waiting=1) as server:
        step = server.worker.engine.step
        monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.03) or step())
        stream = {**LONG, "stream": True}
        with ThreadPoolExecutor() as pool:
            # The headers come with the first token, so the second waits for the first one's end.
            first = server.post("/v1/completions", stream, stream=True)
            # One place is free, and whoever comes next is taken: large ones do not starve.
            large = {**LONG, "n": 4, "max_tokens": 2}
            second = pool.submit(server.post, "/v1/completions", large)
            wait_until(lambda: server.worker.num_waiting == 4)
            refused = server.post("/v1/completions", LONG)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert server.get("/health").json()["num_requests_waiting"] == 4
            figures = metrics(server)
            assert figures['early_exit:http_answers_total{status="429"}'] == 1
            # While none of them has ended.
            assert figures["early_exit:generation_tokens_total"] >= 1
            assert figures["early_exit:e2e_request_latency_seconds_count"] == 0
            first.close()
            assert second.result().status_code == 200
        assert server.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_an_answer_has_its_time(checkpoint):
    with text_server(checkpoint, request_timeout=0.05) as server:
        late = server.post("/v1/completions", {**LONG, "n": 16})
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "timeout_error"
        wait_until(lambda: server.worker.num_running == 0)


def test_a_key_is_asked_for(checkpoint):
    with text_server(checkpoint, api_key="sesame") as server:
        for given in (None, "Bearer ", "Bearer Sesame", "sesame", "Basic sesame", "Bearer sésame"):
            headers = {} if given is None else {"Authorization": given.encode()}
            response = server.get("/v1/models", headers=headers)
            assert response.status_code == 401, given
            assert response.json()["error"]["type"] == "authentication_error"
            refused = server.post("/v1/completions", {"prompt": "a"}, headers=headers)
            assert refused.status_code == 401
        headers = {"Authorization": "Bearer sesame"}
        assert server.get("/v1/models", headers=headers).status_code == 200
        assert server.get("/health").status_code == 200
        assert server.get("/").status_code == 200


def test_every_answer_has_the_headers(server):
    for path in ("/", "/health", "/v1/models", "/nowhere", "/openapi.json"):
        headers = server.get(path).headers
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_a_model_without_exits_serves_in_full(tmp_path):
    with text_server(save_text_checkpoint(tmp_path, exits=(), chat=False)) as server:
        assert complete(server, max_tokens=3)["metrics"]["mode"] == "full"
        names = [card["id"] for card in server.get("/v1/models").json()["data"]]
        assert names == [NAME, f"{NAME}:full"]
        body = {"prompt": "a", "mode": "early_exit"}
        refused = server.post("/v1/completions", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "mode"
        chat = {"messages": [{"role": "user", "content": "a"}]}
        assert server.post("/v1/chat/completions", chat).json()["error"]["code"] == (
            "no_chat_template"
        )
