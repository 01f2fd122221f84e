"""`/docs`: the API in a browser, and the document that it is made from."""

import copy
from typing import Any

from flask import Blueprint, Response, jsonify, redirect, url_for
from flask_openapi3.openapi import OpenAPI
from flask_openapi3_swagger.plugins import RegisterPlugin
from werkzeug.wrappers import Response as AnyResponse

_STREAMS = ("/v1/completions", "/v1/chat/completions")
NAMES = ("docs", "swagger")
"""The blueprints. They need no key: they show what is known of the project, and no model."""


def add_docs(app: OpenAPI, needs_key: bool) -> None:
    """Add the endpoints; the others have to be there."""
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
