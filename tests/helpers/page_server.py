"""A stand-in for the text-generation server: it serves the page and answers as a script says.

It streams given tokens at a given pace, and fails in every way that the page must explain, which a
real model does not do on demand. Requests and answers go through the real server's pydantic models,
so that both have the same protocol. `python -m tests.helpers.page_server` serves it for a look.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flask import Flask, Response, jsonify, request, send_from_directory
from werkzeug.serving import make_server

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.server.bodies.answer_models import (  # noqa: E402
    Head,
    RequestMetrics,
    SpeculativeDecoding,
)
from megatron.early_exit.server.openai.chat_models import (  # noqa: E402
    Candidate,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChatToken,
    ChunkChoice,
    Delta,
)
from megatron.early_exit.server.openai.completion_models import (  # noqa: E402
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from megatron.early_exit.server.openai.models import ModelCard, ModelList  # noqa: E402

PAGE = Path(__file__).parents[2] / "megatron" / "early_exit" / "server" / "page"
NUM_LAYERS = 8
EXIT_LAYERS = [2, 4]
# The strictest that a server can send: it also forbids setting any text as HTML.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'"
)

Json = dict[str, Any]


@dataclass(frozen=True)
class ScriptedToken:
    """A token, the layer that gives it, and that layer's confidence."""

    text: str
    layer: int
    confidence: float
    data: bytes | None = None
    """The bytes of a token that is a part of a character, whose text comes with the last part;
    empty for a special token."""

    @property
    def name(self) -> str:
        """The token by itself."""
        if self.data is None:
            return self.text
        if not self.data:
            return "<|special|>"
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.data)

    @property
    def bytes(self) -> bytes:
        return self.text.encode() if self.data is None else self.data


def text_of(tokens: list[ScriptedToken]) -> str:
    return "".join(token.text for token in tokens)


def tokens_of(text: str, layers: str) -> list[ScriptedToken]:
    """A token for each word of `text` with the space before it, and for each line end; their layers
    are the digits in turn. The confidence of exits is above the default threshold."""
    words = text.replace("\n", "\0\n\0").replace(" ", "\0 ").split("\0")
    tokens = []
    for i, word in enumerate(word for word in words if word):
        layer = int(layers[i % len(layers)])
        spread = 0.01 * (7 * i % 19)
        tokens.append(ScriptedToken(word, layer, spread + (0.45 if layer == NUM_LAYERS else 0.81)))
    return tokens


def all_layers(tokens: list[ScriptedToken]) -> list[ScriptedToken]:
    """The same tokens, as if the full model had given them."""
    return [replace(token, layer=NUM_LAYERS) for token in tokens]


# An emoji counts twice in JavaScript, and markup must stay text.
EARLY = tokens_of(
    " a kind of map: near the coast the lines are close together 🙂, and a <b>bold</b> reader takes"
    " them for hills.\n\nFurther out they part. Most of the words in a sentence are like that:"
    " easy to foresee from the few before, so that the first layers are already sure of them.",
    "2282442824",
)
FULL = all_layers(
    EARLY[:18]
    + tokens_of(
        " them for granted.\n\nFurther out they part. Most of the words in a sentence are like"
        " that: they follow from the few before, and only some need the whole depth of the model.",
        "8",
    )
)


@dataclass
class Script:
    """What the server does; tests change it before the page sends a request."""

    early: list[ScriptedToken] = field(default_factory=lambda: list(EARLY))
    full: list[ScriptedToken] = field(default_factory=lambda: list(FULL))
    exit_layers: list[int] = field(default_factory=lambda: list(EXIT_LAYERS))
    exit_measures: list[str] = field(default_factory=lambda: ["max_probability", "entropy"])
    draft_methods: list[str] | None = None
    """None is what exits alone can do."""
    has_text: bool = True
    has_chat_template: bool = False
    stored_rule: dict[str, Any] | None = None
    example_prompts: list[str] = field(default_factory=list)
    seconds_per_token: float = 0.0
    tokens_per_event: int = 1
    held_back: frozenset[int] = frozenset()
    """Tokens whose text comes with the next one's."""
    api_key: str | None = None
    refusal: tuple[int, str] | None = None
    """Status and message of every completion, or only of those in `refused_mode`."""
    refused_mode: str | None = None
    refused_param: str | None = None
    """The field that a refusal names."""
    full_speed: float = 41.5
    """Tokens per second of the full model; exits report 90.25."""
    acceptance: float = 0.75
    """Share of the drafts that are accepted."""
    unsure: float = 0.12
    """Confidence of an exit that does not give the token."""
    error_after: int | None = None
    """Number of tokens after which the stream has an error."""
    cut_after: int | None = None
    """Number of tokens after which the connection ends."""
    requests: list[Json] = field(default_factory=list)
    """The request bodies of the completions."""
    left_at: list[int] = field(default_factory=list)
    """Numbers of tokens that had been sent when clients disconnected."""


class PageServer:
    """Serves the page on a free port of this machine while the context lasts."""

    def __init__(self, port: int = 0) -> None:
        self.script = Script()
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._server = make_server("127.0.0.1", port, self._make_app(), threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _make_app(self) -> Flask:
        app = Flask(__name__, static_folder=None)
        app.get("/", defaults={"name": "index.html"})(self._file)
        app.get("/static/<name>")(self._file)
        app.get("/v1/models")(self._models)
        app.post("/v1/completions")(self._completions)
        app.post("/v1/chat/completions")(self._completions)
        app.before_request(self._check_key)
        app.after_request(_add_policy)
        return app

    def _check_key(self) -> Response | None:
        key = self.script.api_key
        is_public = request.path == "/" or request.path.startswith("/static/")
        if is_public or key in (None, request.headers.get("Authorization", "")[len("Bearer ") :]):
            return None
        return _error(401, "give it as Authorization: Bearer KEY", "authentication_error")

    def _file(self, name: str) -> Response:
        # Many pages are opened, and their files do not change meanwhile.
        return send_from_directory(PAGE, name, max_age=60)

    def _models(self) -> Response:
        script = self.script
        rule = script.stored_rule or {}
        exits, methods = script.exit_layers, script.draft_methods
        if methods is None:
            methods = ["exit"] if exits else []
        aliases = ["", ":full", ":lossless"] if script.exit_layers else ["", ":full"]
        cards = [
            ModelCard(
                id=f"scripted{alias}",
                created=0,
                root="scripted",
                max_model_len=2048,
                num_layers=NUM_LAYERS,
                exit_layers=script.exit_layers,
                has_text=script.has_text,
                has_chat_template=script.has_chat_template,
                example_prompts=script.example_prompts,
                default_mode="early_exit" if script.exit_layers else "full",
                exit_measures=script.exit_measures,
                exit_measure=script.exit_measures[0],
                draft_methods=methods,
                drafter=methods[-1] if "mtp" in methods else f"{exits[0]}" if exits else None,
                kv_policy="exact",
                early_exit_threshold=rule.get("early_exit_threshold", 0.8),
                exit_thresholds=rule.get("exit_thresholds"),
                default_exit_layers=list(rule.get("exit_layers", script.exit_layers)),
                stored_rule=script.stored_rule,
            )
            for alias in aliases
        ]
        return jsonify(ModelList(data=cards).model_dump())

    def _completions(self) -> Response:
        self.script.requests.append(request.get_json())
        is_chat = "messages" in request.get_json()
        model = ChatRequest if is_chat else CompletionRequest
        body = model.model_validate(request.get_json())
        if self.script.refusal and self.script.refused_mode in (None, body.mode):
            status, message = self.script.refusal
            kind = "rate_limit_error" if status == 429 else "invalid_request_error"
            return _error(status, message, kind, self.script.refused_param)
        return Response(self._stream(body), mimetype="text/event-stream")

    def _stream(self, body: CompletionRequest | ChatRequest) -> Iterator[str]:
        """The events, at the script's pace; the full model is half as fast."""
        script = self.script
        is_full = body.mode == "full"
        tokens = (script.full if is_full else script.early)[: body.max_tokens]
        pause = script.seconds_per_token * (2 if is_full else 1)
        held = ""
        start = 0
        try:
            while start < len(tokens):
                for limit, error in ((script.error_after, True), (script.cut_after, False)):
                    if limit is not None and start >= limit:
                        if error:
                            message = {"message": "out of memory", "type": "server_error"}
                            yield _event(json.dumps({"error": message}))
                        return
                end = min(start + script.tokens_per_event, len(tokens))
                time.sleep(pause * (end - start))
                text = held + text_of(tokens[start:end])
                text, held = ("", text) if start in script.held_back else (text, "")
                choice = CompletionChoice(
                    index=0,
                    text=text if script.has_text else "",
                    logprobs=self._logprobs(tokens, start, end, body.exit_details),
                    finish_reason="length" if end == len(tokens) else None,
                    token_ids=[_token_id(token) for token in tokens[start:end]],
                )
                event = _response(choices=[choice])
                is_chat = isinstance(body, ChatRequest)
                yield _event(
                    (_as_chat(event, tokens[start:end]) if is_chat else event).model_dump_json()
                )
                start = end
        except GeneratorExit:
            script.left_at.append(start)
            raise
        metrics = _metrics(tokens, body, script)
        yield _event(_response(choices=[], metrics=metrics).model_dump_json())
        yield _event("[DONE]")

    def _logprobs(
        self, tokens: list[ScriptedToken], start: int, end: int, details: bool
    ) -> CompletionLogprobs:
        new = tokens[start:end]
        has_text = self.script.has_text
        names = [token.name if has_text else str(_token_id(token)) for token in new]
        heads = [
            [
                Head(layer=layer, token=name, confidence=token.confidence)
                if layer == token.layer
                else Head(layer=layer, token=" it", confidence=self.script.unsure * layer / 2)
                for layer in (*self.script.exit_layers, NUM_LAYERS)
                if layer <= token.layer
            ]
            for token, name in zip(new, names, strict=True)
        ]
        return CompletionLogprobs(
            tokens=names,
            token_logprobs=[-1.2 * (1 - token.confidence) for token in new],
            top_logprobs=[{name: -0.2, " it": -2.5, "\n": -4.1} for name in names],
            text_offset=[len(text_of(tokens[:i])) for i in range(start, end)],
            exit_layers=[token.layer for token in new],
            confidences=[token.confidence for token in new],
            heads=heads if details else None,
        )


def _as_chat(event: CompletionResponse, tokens: list[ScriptedToken]) -> ChatChunk:
    """The same event of a conversation."""
    (choice,) = event.choices
    given = choice.logprobs
    assert given is not None
    content = [
        ChatToken(
            token=name,
            logprob=given.token_logprobs[i] or 0.0,
            bytes=list(tokens[i].bytes) or None,
            top_logprobs=[
                Candidate(token=other, logprob=logprob, bytes=list(other.encode()))
                for other, logprob in (given.top_logprobs[i] or {}).items()
            ],
            exit_layer=given.exit_layers[i] or 0,
            confidence=given.confidences[i] or 0.0,
            heads=given.heads[i] if given.heads else None,
        )
        for i, name in enumerate(given.tokens)
    ]
    return ChatChunk(
        id="chatcmpl-1",
        created=0,
        model="scripted",
        choices=[
            ChunkChoice(
                index=0,
                delta=Delta(content=choice.text),
                finish_reason=choice.finish_reason,
                logprobs=ChatLogprobs(content=content),
                token_ids=choice.token_ids,
            )
        ],
    )


def _metrics(
    tokens: list[ScriptedToken], body: CompletionRequest | ChatRequest, script: Script
) -> RequestMetrics:
    layers = [token.layer for token in tokens]
    drafting = SpeculativeDecoding(
        num_spec_steps=10,
        num_draft_tokens=40,
        num_accepted_draft_tokens=30,
        mean_acceptance_length=4.0,
        draft_acceptance_rate=script.acceptance,
        num_mtp_draft_tokens=0,
        num_accepted_mtp_draft_tokens=0,
        num_undrafted_tokens=0,
    )
    return RequestMetrics(
        mode=str(body.mode),
        early_exit_threshold=body.early_exit_threshold,
        exit_measure=body.exit_measure,
        exit_thresholds=body.exit_thresholds,
        exit_threshold_decay=body.exit_threshold_decay,
        kv_policy=body.kv_policy,
        exits_pay_at=body.exits_pay_at,
        num_unasked_tokens=0 if body.mode == "early_exit" else None,
        num_layers=NUM_LAYERS,
        mean_exit_layer=sum(layers) / len(layers),
        exit_tokens={str(layer): layers.count(layer) for layer in sorted(set(layers))},
        time_to_first_token_seconds=0.02,
        decode_seconds=1.0,
        tokens_per_second=script.full_speed if body.mode == "full" else 90.25,
        speculative_decoding=drafting if body.mode == "self_speculative" else None,
    )


def _token_id(token: ScriptedToken) -> int:
    return sum(map(ord, token.text)) % 1000


def _response(**fields: Any) -> CompletionResponse:
    return CompletionResponse(id="cmpl-1", created=0, model="scripted", **fields)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _error(status: int, message: str, kind: str, param: str | None = None) -> Response:
    answer = jsonify({"error": {"message": message, "type": kind, "param": param, "code": None}})
    answer.status_code = status
    return answer


def _add_policy(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


if __name__ == "__main__":
    with PageServer(port=8123) as server:
        server.script.seconds_per_token = 0.04
        print(server.url)
        threading.Event().wait()
