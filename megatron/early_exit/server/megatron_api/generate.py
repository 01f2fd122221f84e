"""`/api`: the protocol of the servers of Megatron and of EE-LLM (arXiv 2312.04916)."""

from time import perf_counter
from typing import Annotated, Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.ranges import Range
from megatron.early_exit.server.bodies.answer_models import Head
from megatron.early_exit.server.bodies.fields import (
    MEASURES,
    PAYS,
    STORED,
    BatchSize,
    Decay,
    ExitFields,
    Natural,
    RequestModel,
    Share,
    Stops,
    not_supported,
)
from megatron.early_exit.server.bodies.ranges import InRange
from megatron.early_exit.server.bodies.token_texts import as_number
from megatron.early_exit.server.engine_thread.job import Job
from megatron.early_exit.server.http.errors import (
    GENERATE_ERRORS,
    GENERATE_PATH,
    ApiError,
    of_field,
)
from megatron.early_exit.server.service import Service, answer

_NO_BEAMS = "there is no beam search here, as in Megatron 0.19"


def _refuse(_: object) -> None:
    raise ValueError(_NO_BEAMS)


NoBeams = Annotated[None, BeforeValidator(_refuse), Field(description=f"Refused: {_NO_BEAMS}.")]


class GenerateRequest(RequestModel):
    """Megatron's request, with EE-LLM's fields."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=128)]
    tokens_to_generate: Annotated[int, InRange(Range(least=0, most=2**31))] = 64
    logprobs: bool = False
    temperature: Annotated[float, InRange(Range(least=0, most=100, excludes_least=True))] = 1.0
    top_k: Annotated[int, InRange(Range(least=0, most=1000))] = Field(
        0, description="1 takes the most probable token, 0 is no limit."
    )
    top_p: Share = Field(0.0, description="0: no limit. Not together with top_k.")
    top_p_decay: Share = Field(0.0, description="0: none.")
    top_p_bound: Share = 0.0
    add_BOS: bool = False
    stop_on_eol: bool = Field(False, description="End before a line break.")
    stop_on_double_eol: bool = Field(False, description="End before an empty line.")
    stop_sequences: Stops = None
    random_seed: Natural | None = None
    echo_prompts: bool = Field(True, description="Put prompts in front of texts, as Megatron does.")
    use_early_exit: bool | None = Field(
        None,
        description="Take tokens from exits that are sure enough; false runs all layers. Default: "
        "the server's. Threshold and exits are of no interest where no token is taken from exits: "
        "EE-LLM's clients always send them.",
    )
    early_exit_thres: Share | None = Field(None, description="How sure.")
    exit_layers: list[Natural] | None = Field(
        None,
        description="The exits that are asked; an empty list is all of them, or those of the "
        "server's --exit-layers. Default: the server's.",
    )
    exit_measure: ExitMeasure | None = Field(None, description=f"{MEASURES} {STORED}")
    exit_thresholds: list[Share] | None = Field(
        None, description="One for each exit that is asked, instead of early_exit_thres."
    )
    exit_threshold_decay: Decay | None = Field(
        None, description="Let thresholds decay with the place of the token; 0 is off."
    )
    kv_policy: KVPolicy | None = Field(
        None, description="As in /v1/completions; of no interest where no token leaves early."
    )
    exits_pay_at: BatchSize | None = Field(
        None, description=f"{PAYS} As kv_policy of no interest where no token leaves early."
    )
    print_max_prob: bool = Field(
        False, description="Tell what each head on the way to a token found best (`max_probs`)."
    )
    no_log: bool = Field(False, description="Keep the prompts out of the log in any case.")
    prevent_newline_after_colon: Annotated[bool, AfterValidator(not_supported)] = False
    beam_width: NoBeams = None
    length_penalty: NoBeams = None
    stop_token: NoBeams = None


class GenerateResponse(BaseModel):
    """One entry for each prompt in every list."""

    text: list[str]
    segments: list[list[str]] = Field(description="The texts, token by token.")
    tokens: list[list[int]]
    logprobs: list[list[float]] | None = Field(
        description="Of the tokens; where prompts are echoed of theirs, too, but for the first."
    )
    exit_layers: list[list[int]] = Field(description="Of each generated token.")
    confidences: list[list[float]] = Field(description="Of each generated token.")
    max_probs: list[list[list[Head]]] | None
    request_time: float = Field(description="Seconds.")
    requst_time: float = Field(
        description="EE-LLM's spelling of request_time.", json_schema_extra={"deprecated": True}
    )
    """The time of the request in seconds, for clients that read this name."""


_MEASURING = ("exit_measure", "exit_thresholds", "exit_threshold_decay")
_FIELDS = {
    "max_tokens": "tokens_to_generate",
    "seed": "random_seed",
    "stop": "stop_sequences",
    "early_exit_threshold": "early_exit_thres",
}
"""The protocol's names of the engine's fields, for errors."""


def generate(service: Service) -> APIBlueprint:
    """The endpoint."""
    tags = [Tag(name="Megatron and EE-LLM")]
    blueprint = APIBlueprint("generate", __name__, abp_tags=tags, abp_responses=GENERATE_ERRORS)

    def generated(body: GenerateRequest) -> Response:
        begin = perf_counter()
        params = _params(body, service)
        prompts = _prompts(body, service)
        if "tokens_to_generate" in body.model_fields_set:
            service.check_limit("tokens_to_generate", body.tokens_to_generate, prompts)
        job = service.submit(prompts, params, answers=1, is_streamed=False)
        service.finish(job)
        return answer(_response(body, service, job, perf_counter() - begin))

    @blueprint.put(GENERATE_PATH, responses={200: GenerateResponse})
    def put_generate(body: GenerateRequest) -> Response:
        """Continue texts."""
        return generated(body)

    @blueprint.post(GENERATE_PATH, responses={200: GenerateResponse})
    def post_generate(body: GenerateRequest) -> Response:
        """Continue texts."""
        return generated(body)

    return blueprint


def _prompts(body: GenerateRequest, service: Service) -> list[list[int]]:
    room = min(1, body.tokens_to_generate)
    if not body.add_BOS:
        return service.encode_all(body.prompts, 1, "prompts", room)
    begin = None if service.tokenizer is None else service.tokenizer.bos_id
    if begin is None:
        raise ApiError(400, "add_BOS true: the tokenizer has no such token", "add_BOS")
    own = [service.encode_text(one, "prompts", add_special_tokens=False) for one in body.prompts]
    return service.encode_all([[begin, *tokens] for tokens in own], 1, "prompts", room)


def _params(body: GenerateRequest, service: Service) -> SamplingParams:
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
            **_exit_params(body, service),
        )
    except FieldError as error:
        raise of_field(error, _FIELDS) from error


def _exit_params(body: GenerateRequest, service: Service) -> dict[str, Any]:
    settings, exits = service.model.settings(None), service.model.exit_layers
    if body.use_early_exit and not exits:
        raise ApiError(400, "use_early_exit true: the model has no exits", "use_early_exit")
    is_early = body.use_early_exit
    if is_early is None:
        is_early = settings.mode == "early_exit" or any(
            getattr(body, name) is not None for name in _MEASURING
        )
    # Clients send these in any case: they ask for nothing where only a stored rule says the mode.
    is_asked = is_early and (body.use_early_exit or "mode" not in settings.stored)
    is_asked |= any(getattr(body, name) is not None for name in _MEASURING)
    layers = body.exit_layers or None
    if body.exit_layers == [] and "exit_layers" in settings.stored:
        layers = list(exits)
    fields = ExitFields.model_validate(
        {
            "use_early_exit": body.use_early_exit,
            "exit_details": body.print_max_prob,
            "early_exit_threshold": body.early_exit_thres if is_asked else None,
            "exit_layers": layers if is_asked else None,
            **{name: getattr(body, name) for name in _MEASURING},
            "kv_policy": body.kv_policy if is_early else None,
            "exits_pay_at": body.exits_pay_at if is_early else None,
        }
    )
    return fields.exit_params(
        settings,
        len(exits),
        service.model.num_depths,
        only_scores=body.tokens_to_generate == 0,
    )


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
        logprobs.append([as_number(one) for one in (*scores, *result.logprobs)])
    heads = None
    if body.print_max_prob:
        heads = [[service.texts.heads(one) for one in result.heads] for result in results]
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
