"""`/`: the page where one sees the exits."""

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

FOLDER = Path(__file__).resolve().parents[1] / "page"


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
