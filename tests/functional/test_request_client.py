"""tools/request_client.py against a server, and against none."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron.early_exit.client.figures import percentile
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.text_checkpoint import EXITS, save_text_checkpoint
from tests.helpers.text_server import NAME, text_server
from tools.request_client import main

PROMPTS = ["the 7 quick brown", "pack my box", "lazy dogs", "five — dozen"]
KEY = "sesame"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return EarlyExitEngine.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def url(checkpoint):
    with text_server(checkpoint, api_key=KEY) as server:
        yield server.url


@pytest.fixture
def ask(url, monkeypatch):
    """Runs the tool with the server's address, and its key in the environment."""
    monkeypatch.setenv("EARLY_EXIT_API_KEY", KEY)
    return lambda *flags: main(["--url", url, *flags])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_prompt_gives_its_text(ask, engine, capsys):
    flags = ["--mode", "early_exit", "--exit-thresholds", "0.02", "0.01", "--max-tokens", "20"]
    flags += ["--exit-measure", "margin", "--exit-threshold-decay", "9"]
    flags += ["--kv-policy", "propagate"]
    assert ask("--prompt", PROMPTS[0], *flags) == 0
    out, err = capsys.readouterr()
    params = SamplingParams(
        mode="early_exit",
        exit_measure="margin",
        exit_thresholds=(0.02, 0.01),
        exit_threshold_decay=9.0,
        kv_policy="propagate",
        max_tokens=20,
    )
    (result,) = engine.generate(PROMPTS[0], params)
    assert out == result.text + "\n"
    legend, figures = err.splitlines()
    for layer in (*EXITS, 4):
        assert f"layer {layer}: {result.exit_layers.count(layer)} tokens" in legend
    count = len(result.token_ids)
    assert figures.startswith(f"{count} tokens in ")
    assert figures.endswith(f"mean exit layer {sum(result.exit_layers) / count:.2f}")


def test_each_token_has_the_colour_of_its_exit(ask, engine, monkeypatch):
    # Drafts come several at a time; each has to get its own part of the text.
    terminal = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert ask("--prompt", PROMPTS[3], "--mode", "self_speculative", "--max-tokens", "30") == 0
    params = SamplingParams(mode="self_speculative", draft_confidence=0.25, max_tokens=30)
    (result,) = engine.generate(PROMPTS[3], params)
    marks = {1: "\x1b[42m\x1b[30m", 4: "\x1b[43m\x1b[30m"}
    shown = re.sub(r"\x1b\[0m", "", terminal.getvalue())
    first, *parts = re.split(r"(\x1b\[4[23]m\x1b\[30m)", shown)
    characters = [
        (mark, one)
        for mark, text in zip(parts[::2], parts[1::2], strict=True)
        for one in text.replace("\n", "")
    ]
    expected = [
        (marks[layer], one)
        for text, layer in zip(result.token_texts, result.exit_layers, strict=True)
        for one in text.replace("\n", "")
    ]
    assert first + "".join(parts[1::2]) == result.text + "\n"
    # Bytes that are no text are seen at the next token, and have the colour of their own.
    assert [one for one in characters if one[1] != "\ufffd"] == [
        one for one in expected if one[1] != "\ufffd"
    ]
    assert {mark for mark, _ in characters} == set(marks.values())


@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_a_file_of_prompts_gives_a_file_of_answers(ask, engine, tmp_path, capsys, concurrency):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [*PROMPTS[:2], "x " * 999, *PROMPTS[2:]]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    files = ["--prompts-file", str(prompts), "--output", str(output)]
    flags = ["--temperature", "0.9", "--seed", "4", "--mode", "early_exit", "--max-tokens", "9"]
    flags += ["--exit-layers", "3", "--early-exit-threshold", "0.01", "--concurrency", concurrency]
    # One of the prompts is too long; the others are answered.
    assert ask(*files, *flags) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == texts
    failed = lines.pop(2)
    assert "is too long" in failed["error"]
    assert f"3: error: {failed['error']}" in err
    assert "4 answers, " in err
    params = SamplingParams(
        mode="early_exit",
        early_exit_threshold=0.01,
        exit_layers=(3,),
        max_tokens=9,
        temperature=0.9,
        seed=4,
    )
    for line in lines:
        (result,) = engine.generate(line["prompt"], params)
        assert (line["text"], line["token_ids"]) == (result.text, result.token_ids)
        assert line["exit_layers"] == result.exit_layers
        assert line["finish_reason"] == result.finish_reason
        assert line["error"] is None
        assert 0 < line["time_to_first_token_seconds"] <= line["latency_seconds"]
        assert line["metrics"]["mode"] == "early_exit"
        assert line["usage"]["completion_tokens"] == len(result.token_ids)


def test_lines_of_a_text_are_prompts(ask, engine, tmp_path, capsys):
    prompts = tmp_path / "in.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    assert ask("--prompts-file", str(prompts), "--max-tokens", "5", "--mode", "full") == 0
    out, err = capsys.readouterr()
    results = engine.generate(PROMPTS, SamplingParams(max_tokens=5))
    assert out == "".join(result.text + "\n" for result in results)
    assert "tokens by exit layer: 4: 100.0%" in err


def test_a_comparison_tells_what_exits_change(ask, engine, tmp_path, capsys):
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(PROMPTS))
    flags = ["--prompts-file", str(prompts), "--output", str(output), "--max-tokens", "12"]
    assert ask(*flags, "--compare", "--model", f"{NAME}:exit=1") == 0
    err = capsys.readouterr().err
    params = SamplingParams(
        mode="early_exit", early_exit_threshold=0.0, exit_layers=(1,), max_tokens=12
    )
    exits = engine.generate(PROMPTS, params)
    fulls = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    equal = total = 0
    for number, (line, exit_, full) in enumerate(zip(lines, exits, fulls, strict=True), start=1):
        assert line["text"] == exit_.text
        assert line["full"]["text"] == full.text
        same = [a == b for a, b in zip(exit_.token_ids, full.token_ids, strict=False)]
        places = max(len(exit_.token_ids), len(full.token_ids))
        assert not all(same)
        said = f"token {same.index(False)} differs first, {sum(same) / places:.1%} equal"
        (own,) = [one for one in err.splitlines() if one.startswith(f"{number}: ") and said in one]
        assert "in mode full" in own
        equal, total = equal + sum(same), total + places
    assert f"{equal / total:.1%} of tokens equal, 0 of 4 texts" in err
    assert ask("--prompt", PROMPTS[0], "--compare", "--mode", "self_speculative") == 0
    err = capsys.readouterr().err
    assert "all tokens equal" in err
    assert "100.0% of tokens equal, 1 of 1 texts" in err


def test_a_conversation_ends_at_an_empty_line(ask, engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n{'x ' * 999}\n{PROMPTS[1]}\n\nz"))
    assert ask("--max-tokens", "4", "--mode", "full") == 0
    out, err = capsys.readouterr()
    results = engine.generate([PROMPTS[0], PROMPTS[1]], SamplingParams(max_tokens=4))
    assert out == "".join(result.text + "\n" for result in results)
    assert err.count("error: prompt: is too long") == 1


def test_a_conversation_ends_with_its_input(ask, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a"))
    assert ask("--max-tokens", "2") == 0
    assert "2 tokens in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt", "a", "--url", "localhost:1"],
            "--url localhost:1 is not an address, allowed:",
        ),
        (["--prompt", "a", "--concurrency", "0"], "--concurrency 0 is out of range, allowed: 1"),
        (["--prompt", "a", "--timeout", "0"], "--timeout 0.0 is out of range, allowed: above 0"),
        (
            ["--prompts-file", "in.csv"],
            "--prompts-file in.csv has an unknown ending, allowed: .jsonl",
        ),
        (["--prompts-file", "/no/such.txt"], "--prompts-file /no/such.txt cannot be read"),
        (["--prompt", "a", "--compare", "--mode", "full"], "--mode full: there is nothing to"),
        (["--compare"], "--compare needs --prompt or --prompts-file"),
        (["--output", "x"], "--output needs --prompt or --prompts-file"),
        (["--prompt", "a", "--output", "/no/such/file"], "No such file or directory"),
        (["--prompt", "a", "--model", "other"], "does not exist, allowed: tiny, tiny:full"),
        (["--prompt", "a", "--api-key", "wrong"], "the API key is missing or wrong"),
        (["--prompt", "a", "--early-exit-threshold", "2"], "early_exit_threshold 2.0: "),
        (["--prompt", "a", "--exit-layers", "2", "--compare"], "exit_layers 2 is unknown"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(ask, capsys, flags, message):
    assert ask(*flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["--url", f"http://127.0.0.1:{port}", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == (
        f"error: no server answers at http://127.0.0.1:{port}: Connection refused\n"
    )


class Broken(BaseHTTPRequestHandler):
    """A server whose streams end after a token, each in its own way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        cards = {"data": [{"id": "broken", "root": "broken", "num_layers": 2, "exit_layers": []}]}
        self._send(json.dumps(cards if self.server.knows_models else {"data": []}), ends=True)

    def do_POST(self):
        logprobs = {"exit_layers": [2], "text_offset": [0]}
        choice = {"text": "a", "finish_reason": None, "token_ids": [1], "logprobs": logprobs}
        event = {"choices": [choice], "usage": None, "metrics": None}
        self._send(f"data: {json.dumps(event)}\n\n{self.server.last}", self.server.ends)

    def _send(self, body, ends):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(f"{len(body):x}\r\n{body}\r\n".encode())
        if ends:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("ends", "last", "knows_models", "message"),
    [
        (False, "", True, "has broken the connection: "),
        (True, "", True, "has ended an answer before its end"),
        (
            True,
            'data: {"error": {"message": "the engine has failed"}}\n\n',
            True,
            "the engine has fai",
        ),
        (True, "", False, "is not an early-exit server"),
    ],
    ids=["broken", "short", "failed", "other"],
)
def test_a_stream_that_breaks_is_one_sentence(capsys, ends, last, knows_models, message):
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        server.ends, server.last, server.knows_models = ends, last, knows_models
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert main(["--url", f"http://127.0.0.1:{server.server_port}", "--prompt", "x"]) == 2
        server.shutdown()
    out, err = capsys.readouterr()
    assert out == ("a" if knows_models else "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_percentiles_are_values_that_were_there():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.99) == 5.0
    assert percentile(values, 0.0) == 1.0
    assert percentile([7.0], 0.5) == 7.0


def test_the_client_runs_where_there_is_no_torch():
    code = "import sys; sys.modules['torch'] = None; import tools.request_client"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
