"""Pages of other origins that may use the server: CORS."""

from collections.abc import Collection

from flask import Flask, Response, request

_METHODS = "GET, POST, PUT, OPTIONS"
_HEADERS = "Authorization, Content-Type, X-Request-Id"
_EXPOSED = "X-Request-Id, Retry-After"
_LIFETIME_S = "600"


def allow_origins(app: Flask, origins: Collection[str]) -> None:
    """Let pages of these origins use the API; to be called before a key is asked for.

    Browsers ask without the key whether they may send it (a preflight).

    Args:
        origins: each as browsers send it, `https://example.org:8443`; `*` is all of them.
    """
    if not origins:
        return

    @app.before_request
    def answer_preflight() -> Response | None:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return Response(status=204)
        return None

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.vary.add("Origin")
        origin = request.headers.get("Origin")
        if origin is None or not ("*" in origins or origin in origins):
            return response
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            # OpenAI's client for JavaScript sends headers of its own. A key is no cookie: browsers
            # do not add it by themselves.
            asked = request.headers.get("Access-Control-Request-Headers")
            response.headers["Access-Control-Allow-Headers"] = asked or _HEADERS
            response.vary.add("Access-Control-Request-Headers")
            response.headers["Access-Control-Max-Age"] = _LIFETIME_S
        return response
