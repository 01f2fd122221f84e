"""`/v1/chat/completions`: OpenAI's conversations, by the tokenizer's chat template."""

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.server.bodies.stream_options import check_stream_options
from megatron.early_exit.server.http.errors import ERRORS, ApiError, of_field
from megatron.early_exit.server.openai.chat_answer import ChatAnswer
from megatron.early_exit.server.openai.chat_models import ChatRequest, ChatResponse
from megatron.early_exit.server.service import Service, answer, client_is_gone


def chat(service: Service) -> APIBlueprint:
    """The endpoint."""
    blueprint = APIBlueprint("chat", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)

    @blueprint.post("/v1/chat/completions", responses={200: ChatResponse})
    def create_chat_completion(body: ChatRequest) -> Response:
        """Answer the last message of a conversation."""
        tokens = service.encode(_prompt(body, service), "messages", room=1)
        params = _params(body, service, len(tokens))
        for name in ("max_completion_tokens", "max_tokens"):
            service.check_limit(name, getattr(body, name), [tokens])
        job = service.submit([tokens], params, body.n, body.stream)
        pieces = ChatAnswer(body, params, service, job)
        if body.stream:
            return service.stream(job, pieces.events(job.tokens(client_is_gone())))
        service.finish(job)
        return answer(pieces.whole())

    return blueprint


def _prompt(body: ChatRequest, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ApiError(
            400,
            "messages: the model's tokenizer has no chat template, use /v1/completions",
            "messages",
            "no_chat_template",
        )
    try:
        return tokenizer.encode_chat([one.for_template() for one in body.messages])
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error


def _params(body: ChatRequest, service: Service, num_tokens: int) -> SamplingParams:
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: has no effect without logprobs", "top_logprobs")
    if body.exit_details and not body.logprobs:
        raise ApiError(400, "exit_details true: has no effect without logprobs", "exit_details")
    settings = service.model.settings(body.model)
    limits = {one for one in (body.max_completion_tokens, body.max_tokens) if one is not None}
    if len(limits) > 1:
        message = f"max_tokens {body.max_tokens}: contradicts max_completion_tokens"
        raise ApiError(400, message, "max_tokens")
    try:
        return SamplingParams(
            **body.sampling_params(),
            **body.exit_params(settings, len(service.model.exit_layers)),
            max_tokens=limits.pop() if limits else service.max_model_len - num_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
    except FieldError as error:
        raise of_field(error) from error
