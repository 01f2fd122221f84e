"""What people open in a browser: the page at `/` that shows exits, and the API at `/docs`."""

import copy
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, redirect, send_from_directory, url_for
from flask_openapi3.openapi import OpenAPI
from flask_openapi3_swagger.plugins import RegisterPlugin
from werkzeug.wrappers import Response as AnyResponse

FOLDER = Path(__file__).resolve().parents[1] / "page"
NAMES = ("docs", "swagger")
"""The blueprints of the API. They need no key: they show what is known of the project, and no
model."""
_STREAMS = ("/v1/completions", "/v1/chat/completions")


def page() -> Blueprint:
    """The page and its files."""
    blueprint = Blueprint("page", __name__)

    @blueprint.get("/")
    def index() -> Response:
        return send_from_directory(FOLDER, "index.html")

    @blueprint.get("/static/<name>")
    def static_file(name: str) -> Response:
        return send_from_directory(FOLDER, name)

    return blueprint


def add_docs(app: OpenAPI, needs_key: bool) -> None:
    """Add the endpoints that describe the API; all others have to be there already."""
    blueprint = Blueprint("docs", __name__)

    @blueprint.get("/openapi.json")
    def description() -> Response:
        return jsonify(_description(app, needs_key))

    @blueprint.get("/docs")
    @blueprint.get("/docs/")
    def index() -> AnyResponse:
        return redirect(url_for("swagger.swagger"))

    app.register_blueprint(blueprint)
    # It is found from the page, so that it works behind a proxy's prefix, too.
    app.register_blueprint(RegisterPlugin.register(doc_url="../openapi.json"), url_prefix="/docs")


def _description(app: OpenAPI, needs_key: bool) -> dict[str, Any]:
    document = copy.deepcopy(app.api_doc)
    for path in _STREAMS:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if needs_key:
        document["security"] = [{"key": []}]
    return document
