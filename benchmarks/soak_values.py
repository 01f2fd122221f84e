"""Hostile request bodies, made at random from the server's OpenAPI document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_TEXTS = (
    *("", " ", "the", "true", "1", "NaN", "null", "\x00", "\ud800", "\ufffe", "é" * 50, "🙂" * 20),
    *(
        "../../etc/passwd",
        "{{7*7}}",
        "'; DROP TABLE x; --",
        "%s%n",
        "\r\nX-Injected: 1",
        "a" * 5000,
    ),
)
_NUMBERS = (0, 1, -1, 2, 3, 17, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, 0.5, -0.1, 1.0, 1.5)
_OTHERS: tuple[Any, ...] = (
    1e308,
    5e-324,
    -0.0,
    True,
    False,
    None,
    [],
    {},
    [[]],
    [None],
    [[1], "a"],
    {"": {}},
)
_RAW = ("NaN", "-Infinity", "1e999", "9" * 400, "01", "'a'", "{", '"\\u12"', "[" * 3000)
"""Parts of a body that are not JSON, or unusual JSON."""
_PATHS = ("/../..", "//", "/%00", "/%ff", "*", "http://b/", "/?" + "a" * 9000)
_GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the quick", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/api": {"prompts": ["the quick"], "tokens_to_generate": 4},
    "/tokenize": {"text": "the quick"},
    "/detokenize": {"tokens": [5, 6]},
}
_SLOT = "@@slot@@"


@dataclass(frozen=True)
class Endpoint:
    """The requests that one path accepts.

    Attributes:
        path: of the URL.
        fields: that its body may have.
        statuses: that its answers may have, by the document.
    """

    path: str
    fields: tuple[str, ...]
    statuses: frozenset[int]

    @property
    def good(self) -> dict[str, Any]:
        """A valid body; empty for endpoints that this file does not know."""
        return dict(_GOOD.get(self.path, {}))


def endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    """All paths that take a JSON body."""
    found = []
    for path, methods in document["paths"].items():
        post = methods.get("post")
        if post is None or "requestBody" not in post:
            continue
        schema = post["requestBody"]["content"]["application/json"]["schema"]
        name = schema.get("$ref", "").rpartition("/")[2]
        fields = document["components"]["schemas"].get(name, schema).get("properties", {})
        statuses = frozenset(int(status) for status in post["responses"] if status.isdigit())
        found.append(Endpoint(path, tuple(fields), statuses))
    return found


def wild_value(random_: random.Random, depth: int = 0) -> Any:
    """Any JSON value, including strings that are hard to handle."""
    kind = random_.random()
    if kind < 0.3:
        return random_.choice(_TEXTS)
    if kind < 0.6:
        return random_.choice(_NUMBERS)
    if kind < 0.8 or depth > 2:
        return random_.choice(_OTHERS)
    if kind < 0.9:
        return [wild_value(random_, depth + 1) for _ in range(random_.randrange(4))]
    return {
        str(random_.choice(_TEXTS))[:40]: wild_value(random_, depth + 1)
        for _ in range(random_.randrange(3))
    }


def _wild_fields(random_: random.Random, endpoint: Endpoint) -> bytes:
    body = endpoint.good
    for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
        name = random_.choice(endpoint.fields or ("text",))
        if random_.random() < 0.05:
            name = str(random_.choice(_TEXTS))[:60]
        body[name] = wild_value(random_)
    for name in list(body):
        if random_.random() < 0.03:
            del body[name]
    return json.dumps(body).encode()


def _no_json(random_: random.Random, endpoint: Endpoint) -> bytes:
    body = endpoint.good | {random_.choice(endpoint.fields or ("text",)): _SLOT}
    return json.dumps(body).replace(f'"{_SLOT}"', random_.choice(_RAW)).encode()


def _damaged(random_: random.Random, endpoint: Endpoint) -> bytes:
    body = bytearray(json.dumps(endpoint.good | {"seed": 5}).encode())
    for _ in range(random_.choice((1, 1, 2, 5))):
        place = random_.randrange(len(body))
        match random_.randrange(3):
            case 0:
                body[place] = random_.randrange(256)
            case 1:
                del body[place:]
                body += b"{"
            case _:
                body[place:place] = random_.randbytes(random_.randrange(1, 8))
    return bytes(body)


def _noise(random_: random.Random, endpoint: Endpoint) -> bytes:
    del endpoint
    return random_.randbytes(random_.randrange(300))


BODIES: dict[str, Callable[[random.Random, Endpoint], bytes]] = {
    "wild fields": _wild_fields,
    "no JSON": _no_json,
    "damaged": _damaged,
    "noise": _noise,
}


def request(path: str, body: bytes, *, method: str = "POST", close: bool = True) -> bytes:
    """A well-formed HTTP request with any body."""
    end = "Connection: close\r\n" if close else ""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{end}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def no_http(random_: random.Random, endpoint: Endpoint) -> bytes:
    """Bytes that are not a request, or a request with wrong headers."""
    body = json.dumps(endpoint.good).encode()
    path, length = endpoint.path, len(body)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    wrong = (
        random_.randbytes(random_.randrange(1, 400)) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\r\n" * random_.randrange(1, 50),
        f"POST {path} HTTP/{random_.choice(('0.9', '9.9', 'x', '2'))}\r\n\r\n".encode(),
        f"{random_.choice(('BREW', 'post', '', 'A' * 300))} {path} HTTP/1.1\r\n\r\n".encode(),
        f"{head}Content-Length: {random_.choice((-1, 'x', '1 2', '+4', 10**20))}\r\n\r\n".encode(),
        f"{head}Content-Length: {length}\r\nContent-Length: 1\r\n\r\n".encode() + body,
        f"{head}Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body,
        f"{head}Transfer-Encoding: {random_.choice(('gzip', 'x', 'chunked, chunked'))}\r\n\r\n"
        f"0\r\n\r\n".encode(),
        f"{head}Transfer-Encoding: chunked\r\n\r\n{random_.choice(('x', '-1', 'f' * 30))}\r\n"
        f"a\r\n0\r\n\r\n".encode(),
        f"{head}X: {'a' * random_.choice((10**4, 3 * 10**5))}\r\n\r\n".encode(),
        f"{head}{''.join(f'X{n}: 1{chr(13)}{chr(10)}' for n in range(3000))}\r\n".encode(),
        f"{head}No colon\r\n: empty\r\n\tfolded\r\n\r\n".encode(),
        f"GET {random_.choice(_PATHS)} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
        request(path, body)[: random_.randrange(1, 60)] + b"\r\n\r\n",
    )
    return random_.choice(wrong)


def other_method(random_: random.Random, endpoint: Endpoint) -> bytes:
    """A path or a method that does not exist, or a wrong content type."""
    method = random_.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"))
    path = random_.choice(
        (endpoint.path, endpoint.path + "/", "/v1", "/static/../app.py", "/v1/models/%0d%0aX:1")
    )
    whole = request(path, b"{}", method=method)
    if random_.random() < 0.3:
        whole = request(endpoint.path, b"{}").replace(b"application/json", b"text/plain")
    return whole
