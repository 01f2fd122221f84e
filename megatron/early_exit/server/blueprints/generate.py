"""`/api`: the protocol of Megatron's and EE-LLM's servers."""

from time import perf_counter
from typing import Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.server.completion_answer import heads_of
from megatron.early_exit.server.errors import ERRORS, ApiError, of_field
from megatron.early_exit.server.generate_models import GenerateRequest, GenerateResponse
from megatron.early_exit.server.job import Job
from megatron.early_exit.server.service import Service, answer
from megatron.early_exit.server.token_texts import LEAST_LOGPROB

_FIELDS = {
    "max_tokens": "tokens_to_generate",
    "seed": "random_seed",
    "stop": "stop_sequences",
    "early_exit_threshold": "early_exit_thres",
}
"""The protocol's names of the engine's fields, for errors."""


def generate(service: Service) -> APIBlueprint:
    """The endpoint."""
    blueprint = APIBlueprint(
        "generate", __name__, abp_tags=[Tag(name="Megatron and EE-LLM")], abp_responses=ERRORS
    )

    def generated(body: GenerateRequest) -> Response:
        begin = perf_counter()
        params = _params(body, service)
        prompts = [_tokens(prompt, body, service) for prompt in body.prompts]
        job = service.submit(prompts, params, 1, "prompts", is_streamed=False)
        service.finish(job)
        return answer(_response(body, service, job, perf_counter() - begin))

    @blueprint.put("/api", responses={200: GenerateResponse})
    def put_generate(body: GenerateRequest) -> Response:
        """Continue texts."""
        return generated(body)

    @blueprint.post("/api", responses={200: GenerateResponse})
    def post_generate(body: GenerateRequest) -> Response:
        """Continue texts."""
        return generated(body)

    return blueprint


def _tokens(prompt: str, body: GenerateRequest, service: Service) -> list[int]:
    room = min(1, body.tokens_to_generate)
    if not body.add_BOS:
        return service.encode(prompt, "prompts", room)
    tokenizer = service.tokenizer
    if tokenizer is None or tokenizer.bos_id is None:
        raise ApiError(400, "add_BOS true: the tokenizer has no such token", "add_BOS")
    own = tokenizer.encode(prompt, add_special_tokens=False)
    return service.encode([tokenizer.bos_id, *own], "prompts", room)


def _params(body: GenerateRequest, service: Service) -> SamplingParams:
    if body.prevent_newline_after_colon:
        raise ApiError(
            400,
            "prevent_newline_after_colon true: is not supported, allowed: false",
            "prevent_newline_after_colon",
        )
    if body.top_k > 0 and body.top_p > 0:
        raise ApiError(400, f"top_p {body.top_p}: cannot be combined with top_k", "top_p")
    for name in ("top_p_decay", "top_p_bound"):
        value = getattr(body, name)
        if value > 0 and body.top_p == 0:
            raise ApiError(400, f"{name} {value}: has no effect without top_p", name)
    stops = [*(body.stop_sequences or ())]
    stops += ["\n"] if body.stop_on_eol else []
    stops += ["\n\n"] if body.stop_on_double_eol else []
    scores_prompt = body.logprobs and body.echo_prompts
    if body.tokens_to_generate == 0 and not scores_prompt:
        raise ApiError(
            400,
            "tokens_to_generate 0: gives nothing, allowed: 0 with logprobs and echo_prompts",
            "tokens_to_generate",
        )
    try:
        return SamplingParams(
            max_tokens=body.tokens_to_generate,
            temperature=0.0 if body.top_k == 1 else body.temperature,
            top_k=0 if body.top_k == 1 else body.top_k,
            top_p=body.top_p or 1.0,
            top_p_decay=body.top_p_decay or 1.0,
            top_p_bound=body.top_p_bound,
            seed=body.random_seed,
            stop=tuple(stops),
            logprobs=0 if body.logprobs else None,
            prompt_logprobs=0 if scores_prompt else None,
            exit_details=body.print_max_prob,
            **_exit_params(body, service),
        )
    except ValueError as error:
        name = str(error).partition(" ")[0]
        raise of_field(error, _FIELDS.get(name)) from error


def _exit_params(body: GenerateRequest, service: Service) -> dict[str, Any]:
    """EE-LLM's clients send threshold and exits in any case; the switch alone decides."""
    settings = service.model.settings(None)
    if not body.use_early_exit:
        if settings.mode == "self_speculative":
            return {
                "mode": "self_speculative",
                "draft_exit_layer": settings.draft_exit_layer,
                "num_draft_tokens": settings.num_draft_tokens,
                "draft_confidence": settings.draft_confidence,
            }
        return {"mode": "full"}
    if not service.model.exit_layers:
        raise ApiError(400, "use_early_exit true: the model has no exits", "use_early_exit")
    threshold = body.early_exit_thres
    return {
        "mode": "early_exit",
        "early_exit_threshold": settings.early_exit_threshold if threshold is None else threshold,
        "exit_layers": tuple(body.exit_layers) if body.exit_layers else settings.exit_layers,
    }


def _response(
    body: GenerateRequest, service: Service, job: Job, seconds: float
) -> GenerateResponse:
    text_of = service.texts.of
    texts, tokens, logprobs = [], [], []
    results = job.results()
    for prompt, result in zip(body.prompts, results, strict=True):
        before = result.prompt_token_ids if body.echo_prompts else []
        texts.append((prompt if body.echo_prompts else "") + (result.text or ""))
        tokens.append([*before, *result.token_ids])
        scores = [one.logprob for one in result.prompt_tokens or () if one.logprob is not None]
        logprobs.append([max(one, LEAST_LOGPROB) for one in (*scores, *result.logprobs)])
    heads = None
    if body.print_max_prob:
        heads = [[heads_of(service, one) for one in result.heads] for result in results]
    return GenerateResponse(
        text=texts,
        segments=[[text_of(token) for token in own] for own in tokens],
        tokens=tokens,
        logprobs=logprobs if body.logprobs else None,
        exit_layers=[result.exit_layers for result in results],
        confidences=[result.confidences for result in results],
        max_probs=heads,
        request_time=seconds,
        requst_time=seconds,
    )
