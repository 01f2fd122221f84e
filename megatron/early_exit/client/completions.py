"""Streamed completions of one server."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import requests

_CONNECT_S = 10.0
_EXTRAS = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": 0,
    "return_token_ids": True,
}
"""The request fields for a stream of tokens with their exits, and the server's figures at its
end."""

WriteToken = Callable[[str, int], None]
"""Called with the text that a token adds, and the layer that gave the token."""


class Unreachable(Exception):
    """No server answers, or the connection to it has broken."""


class RequestFailed(Exception):
    """The server has refused or cancelled a request."""


@dataclass(kw_only=True)
class Completion:
    """The answer to one prompt, and its times."""

    text: str = ""
    """What continues the prompt, without the prompt itself."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens of that text."""
    exit_layers: list[int] = field(default_factory=list)
    """Number of backbone layers behind the choice of each token."""
    finish_reason: str | None = None
    """Why it ended: `stop` or `length`; None if it has not."""
    latency_seconds: float = 0.0
    """Seconds from sending the request to the end of the answer."""
    time_to_first_token_seconds: float | None = None
    """None where there is no token."""
    tokens_per_second: float | None = None
    """Behind the first event that brought tokens; None where there is nothing behind it."""
    usage: dict[str, int] = field(default_factory=dict)
    """Numbers of tokens, as OpenAI's protocol counts them."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The server's own."""

    @property
    def mean_exit_layer(self) -> float | None:
        """Number of layers run for a token, on average; None where there is no token."""
        layers = self.exit_layers
        return sum(layers) / len(layers) if layers else None


class CompletionClient:
    """Asks one server; may be used by several threads.

    Args:
        url: address of the server, with or without /v1 at its end.
        api_key: the key to send; None sends none.
        patience: seconds without data from the server after which a request fails.
    """

    def __init__(self, url: str, api_key: str | None, patience: float) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = (_CONNECT_S, patience)
        self._is_closed = False

    def card(self, model: str | None) -> dict[str, Any]:
        """The server's description of a model, or of its first one if none is named.

        Raises:
            Unreachable: there is no server.
            RequestFailed: the server does not have the model, or refuses the key.
        """
        path = "/v1/models" if model is None else f"/v1/models/{model}"
        try:
            with self._send("GET", path) as response:
                found = response.json()
            card: dict[str, Any] = found["data"][0] if model is None else found
            if not {"id", "root", "num_layers", "exit_layers"} <= card.keys():
                raise KeyError
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestFailed(f"{self._url} is not an early-exit server") from error
        return card

    def complete(self, body: dict[str, Any], write_token: WriteToken | None = None) -> Completion:
        """Request the continuation of a prompt.

        Args:
            body: the request, without the fields that make it a stream with exits.
            write_token: called with each token when it arrives.

        Raises:
            Unreachable: there is no server, or it has stopped before the end of the answer.
            RequestFailed: the server has refused or cancelled the request.
        """
        answer = Completion()
        begin = perf_counter()
        first_time = last_time = begin
        first_count = 0
        with self._send("POST", "/v1/completions", json={**body, **_EXTRAS}) as response:
            for event in self._events(response):
                if not event["choices"]:
                    answer.usage, answer.metrics = event["usage"], event["metrics"]
                    continue
                self._add(answer, event["choices"][0], write_token)
                if answer.token_ids:
                    last_time = perf_counter()
                    if not first_count:
                        first_count, first_time = len(answer.token_ids), last_time
        answer.latency_seconds = perf_counter() - begin
        if first_count:
            answer.time_to_first_token_seconds = first_time - begin
        later = len(answer.token_ids) - first_count
        if later:
            answer.tokens_per_second = later / (last_time - first_time)
        return answer

    def close(self) -> None:
        """Cancel requests that are under way in other threads."""
        self._is_closed = True

    @staticmethod
    def _add(answer: Completion, choice: dict[str, Any], write_token: WriteToken | None) -> None:
        layers, offsets = choice["logprobs"]["exit_layers"], choice["logprobs"]["text_offset"]
        if write_token is not None:
            begin = len(answer.text)
            ends = [offset - begin for offset in offsets[1:]]
            cuts = pairwise([0, *ends, len(choice["text"])])
            for layer, (start, end) in zip(layers, cuts, strict=False):
                write_token(choice["text"][start:end], layer)
        answer.text += choice["text"]
        answer.token_ids += choice["token_ids"]
        answer.exit_layers += layers
        answer.finish_reason = choice["finish_reason"]

    def _events(self, response: requests.Response) -> Iterator[dict[str, Any]]:
        try:
            for line in response.iter_lines():
                if self._is_closed:
                    raise RequestFailed("the request was cancelled")
                if line == b"data: [DONE]":
                    return
                if line:
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise RequestFailed(event["error"]["message"])
                    yield event
        except requests.RequestException as error:
            raise Unreachable(f"{self._url} has broken the connection: {_cause(error)}") from error
        raise Unreachable(f"{self._url} has ended an answer before its end")

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            response = requests.request(
                method,
                self._url + path,
                headers=self._headers,
                timeout=self._timeout,
                stream=True,
                **options,
            )
            if not response.ok:
                raise RequestFailed(_message(response))
        except requests.RequestException as error:
            raise Unreachable(f"no server answers at {self._url}: {_cause(error)}") from error
        return response


def _message(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answers with the status {response.status_code}"


def _cause(error: BaseException) -> str:
    """The innermost cause of an exception."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)
