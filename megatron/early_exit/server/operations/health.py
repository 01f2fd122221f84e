"""For those who run the server: is it well, and what has it done?"""

from typing import Literal

from flask import Response, current_app
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel

from megatron.early_exit.server.http.errors import ERRORS
from megatron.early_exit.server.service import Service, answer


class Health(BaseModel):
    """How the engine is."""

    status: Literal["ok", "unavailable", "failed"]
    reason: str | None = None
    num_requests_running: int
    num_requests_waiting: int


def operations(service: Service) -> APIBlueprint:
    """The endpoints."""
    tags = [Tag(name="Operations")]
    blueprint = APIBlueprint("operations", __name__, abp_tags=tags, abp_responses=ERRORS)
    worker = service.worker

    @blueprint.get("/health", responses={200: Health, 503: Health})
    def health() -> tuple[Response, int]:
        """Tell whether the engine's own thread makes progress, not only the web server's."""
        reason = worker.unhealthy_reason()
        found = Health(
            status="ok" if reason is None else "failed" if worker.failure else "unavailable",
            reason=reason,
            num_requests_running=worker.num_running,
            num_requests_waiting=worker.num_waiting,
        )
        return answer(found), 200 if reason is None else 503

    @blueprint.get(
        "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    )
    def metrics() -> Response:
        """Figures for Prometheus."""
        figures = worker.metrics
        return current_app.response_class(figures.text(), content_type=figures.content_type)

    return blueprint
