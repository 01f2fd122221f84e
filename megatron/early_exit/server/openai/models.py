"""`/v1/models`: the names under which the model answers."""

import time
from typing import Literal

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from megatron.early_exit.server.http.errors import ERRORS
from megatron.early_exit.server.service import Service, answer


class ModelCard(BaseModel):
    """One name, and what the model behind it is."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "megatron.early_exit"
    root: str
    max_model_len: int
    num_layers: int
    exit_layers: list[int]
    has_text: bool
    has_chat_template: bool
    default_mode: str
    exit_measures: list[str] = Field(description="What confidence can be for this model.")
    exit_measure: str = Field(description="Where a request does not say it.")
    draft_methods: list[str] = Field(
        description="What can draft for it in mode self_speculative: its exits, a multi-token-"
        "prediction module, whose tokens have exit_layer 0, or the faster of them."
    )
    drafter: str | None = Field(
        description="What drafts where a request does not say it: the layers in front of an exit, "
        "mtp or auto."
    )
    kv_policy: str = Field(description="Where a request does not say it.")
    example_prompts: list[str] = Field(description="The operator's, for the server's page.")


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelPath(BaseModel):
    """A name in a URL."""

    name: str


def models(service: Service) -> APIBlueprint:
    """The endpoints."""
    tags = [Tag(name="OpenAI")]
    blueprint = APIBlueprint("models", __name__, abp_tags=tags, abp_responses=ERRORS)
    created = int(time.time())
    tokenizer = service.tokenizer

    def card(name: str) -> ModelCard:
        settings = service.model.settings(name)
        return ModelCard(
            id=name,
            created=created,
            root=service.model.name,
            max_model_len=service.max_model_len,
            num_layers=service.num_layers,
            exit_layers=list(service.model.exit_layers),
            has_text=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            default_mode=settings.mode,
            exit_measures=list(service.exit_measures),
            exit_measure=settings.exit_measure or service.exit_measure,
            draft_methods=list(service.model.draft_methods),
            drafter=service.model.drafter,
            kv_policy=settings.kv_policy,
            example_prompts=list(service.settings.example_prompts),
        )

    @blueprint.get("/v1/models", responses={200: ModelList})
    def list_models() -> Response:
        """The names; behind `:threshold=` any number from 0 to 1 is understood."""
        return answer(ModelList(data=[card(one) for one in service.model.names()]))

    @blueprint.get("/v1/models/<path:name>", responses={200: ModelCard})
    def retrieve_model(path: ModelPath) -> Response:
        """One name."""
        return answer(card(path.name))

    return blueprint
