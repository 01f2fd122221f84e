"""`/v1/models`: the names under which the model answers."""

import time
from typing import Literal

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from megatron.early_exit.checkpoint.stored_rule import Promise, StoredRule
from megatron.early_exit.server.http.errors import ERRORS
from megatron.early_exit.server.service import Service, answer
from megatron.early_exit.server.settings import ExitSettings


class RuleCard(BaseModel):
    """The rule that is stored with the model, whatever the server's flags are."""

    early_exit_threshold: float | None = None
    exit_thresholds: list[float] | None = Field(
        None, description="One for each of exit_layers, instead of early_exit_threshold."
    )
    exit_measure: str
    exit_layers: list[int]
    kv_policy: str
    promise: Promise
    says: str = Field(description="The promise as a sentence.")
    is_default: bool = Field(description="Requests that name nothing of exits get it.")


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
        "prediction module, whose tokens have exit_layer 0, or the fastest of all."
    )
    drafter: str | None = Field(
        description="What drafts where a request does not say it: the layers in front of an exit, "
        "mtp or auto."
    )
    kv_policy: str = Field(description="Where a request does not say it.")
    early_exit_threshold: float = Field(description="Where a request does not say it.")
    exit_thresholds: list[float] | None = Field(
        description="Where a request says neither which exits nor which threshold: one for each of "
        "default_exit_layers, instead of early_exit_threshold."
    )
    default_exit_layers: list[int] = Field(
        description="The exits that are asked where a request does not say it."
    )
    stored_rule: RuleCard | None = Field(
        description="What tools/choose_threshold.py has stored with the model."
    )
    example_prompts: list[str] = Field(description="The operator's, for the server's page.")


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelPath(BaseModel):
    """A name in a URL."""

    name: str


def _rule_card(rule: StoredRule | None, settings: ExitSettings) -> RuleCard | None:
    if rule is None:
        return None
    has_changes = settings.exit_threshold_decay or settings.exits_pay_at
    values = rule.defaults()
    is_default = settings.mode == "early_exit" and not has_changes
    is_default &= settings.exit_thresholds == rule.exit_thresholds
    is_default &= all(getattr(settings, name) == one for name, one in values.items())
    promise = rule.promise
    return RuleCard(**values, promise=promise, says=promise.sentence(), is_default=is_default)


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
            early_exit_threshold=settings.early_exit_threshold,
            exit_thresholds=list(settings.exit_thresholds) if settings.exit_thresholds else None,
            default_exit_layers=list(settings.exit_layers or service.model.exit_layers),
            stored_rule=_rule_card(service.stored_rule, settings),
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
