"""`/v1/completions`: OpenAI's continuation of texts."""

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.server.bodies.stream_options import check_stream_options
from megatron.early_exit.server.http.errors import ERRORS, ApiError, of_field
from megatron.early_exit.server.openai.completion_answer import CompletionAnswer
from megatron.early_exit.server.openai.completion_models import (
    CompletionRequest,
    CompletionResponse,
)
from megatron.early_exit.server.service import Service, answer, client_is_gone

_DEFAULT_MAX_TOKENS = 16


def completions(service: Service) -> APIBlueprint:
    """The endpoint."""
    blueprint = APIBlueprint(
        "completions", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS
    )

    @blueprint.post("/v1/completions", responses={200: CompletionResponse})
    def create_completion(body: CompletionRequest) -> Response:
        """Continue texts."""
        params = _params(body, service)
        room = min(params.max_tokens, 1)
        framed = body.add_special_tokens
        prompts = service.encode_all(body.prompt, body.n, "prompt", room, framed)
        service.check_limit("max_tokens", body.max_tokens, prompts)
        job = service.submit(prompts, params, body.n, body.stream)
        pieces = CompletionAnswer(body, params, service, job)
        if body.stream:
            return service.stream(job, pieces.events(job.tokens(client_is_gone())))
        service.finish(job)
        return answer(pieces.whole())

    return blueprint


def _params(body: CompletionRequest, service: Service) -> SamplingParams:
    if body.best_of not in (None, body.n):
        raise ApiError(
            400, f"best_of {body.best_of}: is not supported, allowed: {body.n} (n)", "best_of"
        )
    check_stream_options(body)
    if body.exit_details and body.logprobs is None:
        raise ApiError(400, "exit_details true: has no effect without logprobs", "exit_details")
    settings = service.model.settings(body.model)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens 0: gives nothing, allowed: 1 or more, or 0 with echo", "max_tokens"
        )
    scores_prompt = body.echo and body.logprobs is not None
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    try:
        return SamplingParams(
            **body.sampling_params(),
            **body.exit_params(settings, len(service.model.exit_layers)),
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if scores_prompt else None,
            # The texts of prompts are put in front here; this allows to ask for nothing else.
            echo=body.echo and max_tokens == 0,
        )
    except FieldError as error:
        raise of_field(error) from error
