"""`/v1/completions`: OpenAI's continuation of texts."""

from collections.abc import Iterator, Sequence

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GeneratedToken, PromptToken
from megatron.early_exit.server.bodies.stream_options import check_stream_options
from megatron.early_exit.server.bodies.token_texts import as_number, as_token_id
from megatron.early_exit.server.engine_thread.job import Job, Tokens
from megatron.early_exit.server.http.errors import ERRORS, ApiError, of_field
from megatron.early_exit.server.openai.completion_models import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from megatron.early_exit.server.openai.job_answer import JobAnswer
from megatron.early_exit.server.service import Service, answer, client_is_gone

_DEFAULT_MAX_TOKENS = 16


def completions(service: Service) -> APIBlueprint:
    """The endpoint."""
    tags = [Tag(name="OpenAI")]
    blueprint = APIBlueprint("completions", __name__, abp_tags=tags, abp_responses=ERRORS)

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
        message = f"best_of {body.best_of}: is not supported, allowed: {body.n} (n)"
        raise ApiError(400, message, "best_of")
    check_stream_options(body)
    if body.exit_details and body.logprobs is None:
        raise ApiError(400, "exit_details true: has no effect without logprobs", "exit_details")
    settings = service.model.settings(body.model)
    if body.max_tokens == 0 and not body.echo:
        message = "max_tokens 0: gives nothing, allowed: 1 or more, or 0 with echo"
        raise ApiError(400, message, "max_tokens")
    scores_prompt = body.echo and body.logprobs is not None
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    try:
        return SamplingParams(
            **body.sampling_params(),
            **body.exit_params(
                settings,
                len(service.model.exit_layers),
                service.model.num_depths,
                only_scores=max_tokens == 0,
            ),
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if scores_prompt else None,
            # The texts of prompts are put in front here; this allows to ask for nothing else.
            echo=body.echo and max_tokens == 0,
        )
    except FieldError as error:
        raise of_field(error) from error


class CompletionAnswer(JobAnswer[CompletionRequest]):
    """See `JobAnswer`."""

    kind = "cmpl"

    def __init__(
        self, body: CompletionRequest, params: SamplingParams, service: Service, job: Job
    ) -> None:
        super().__init__(body, params, service, job)
        self._echoed = [0] * job.size
        """Characters of the prompt in front of each text."""
        self._held: dict[int, list[GeneratedToken]] = {i: [] for i in range(job.size)}
        """Tokens that wait for the scores of their prompts."""
        self._open = set(range(job.size))
        self._begun: set[int] = set()

    def whole(self) -> CompletionResponse:
        """The body, when all has ended."""
        requests = enumerate(self._job.requests)
        choices = [self._choice(index, request.tokens) for index, request in requests]
        return CompletionResponse(**self._head, choices=choices, **self._figures())

    def _events(self, batches: Iterator[Tokens]) -> Iterator[str]:
        for batch in batches:
            for index, token in batch:
                self._held[index].append(token)
            yield from self._pieces()
        yield from self._pieces(is_end=True)
        if self._ends_with_figures:
            last = CompletionResponse(**self._head, choices=[], **self._figures())
            yield last.model_dump_json()

    def _pieces(self, is_end: bool = False) -> Iterator[str]:
        scores = self._params.prompt_logprobs is not None
        for index in sorted(self._open):
            request, tokens = self._job.requests[index], self._held[index]
            if not (tokens or is_end) or (scores and request.prompt_tokens is None):
                continue
            choice = self._choice(index, tokens)
            self._held[index] = []
            if choice.finish_reason is not None:
                self._open.discard(index)
            usage = self._running_usage()
            response = CompletionResponse(**self._head, choices=[choice], usage=usage)
            yield response.model_dump_json()

    def _choice(self, index: int, tokens: Sequence[GeneratedToken]) -> CompletionChoice:
        request = self._job.requests[index]
        is_first = index not in self._begun
        self._begun.add(index)
        text = "".join(token.text or "" for token in tokens)
        logprobs = None if self._body.logprobs is None else self._empty_logprobs()
        if is_first and self._body.echo:
            prompt = self._echo(index)
            text = prompt + text
            self._echoed[index] = len(prompt)
            if logprobs is not None:
                self._add_prompt(logprobs, request.prompt_tokens or [])
        if logprobs is not None:
            self._add_tokens(logprobs, index, tokens)
        wants_ids = self._body.return_token_ids
        choice = CompletionChoice(
            index=index,
            text=text,
            finish_reason=None,
            logprobs=logprobs,
            token_ids=[token.token_id for token in tokens] if wants_ids else None,
            prompt_token_ids=request.prompt_token_ids if wants_ids and is_first else None,
        )
        is_last = not tokens or tokens[-1].finish_reason is not None
        if is_last:
            result = request.result()
            if result.finish_reason in ("stop", "length"):
                choice.finish_reason = result.finish_reason
            choice.stop_reason = result.stop_reason
        return choice

    def _echo(self, index: int) -> str:
        prompt = self._body.prompt[index // self._body.n]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._service.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt)

    def _empty_logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[],
            token_logprobs=[],
            top_logprobs=[],
            text_offset=[],
            exit_layers=[],
            confidences=[],
            heads=[] if self._params.exit_details else None,
        )

    def _add_prompt(self, logprobs: CompletionLogprobs, tokens: Sequence[PromptToken]) -> None:
        for token in tokens:
            logprobs.tokens.append(self._service.texts.of(token.token_id))
            if token.logprob is None:
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
            else:
                logprobs.token_logprobs.append(as_number(token.logprob))
                best = self._best(token.token_id, token.logprob, token.top_logprobs)
                logprobs.top_logprobs.append(best)
            logprobs.exit_layers.append(token.exit_layer)
            logprobs.confidences.append(token.confidence)
            if logprobs.heads is not None:
                logprobs.heads.append(None)
        logprobs.text_offset += self._service.texts.offsets([token.token_id for token in tokens])

    def _add_tokens(
        self, logprobs: CompletionLogprobs, index: int, tokens: Sequence[GeneratedToken]
    ) -> None:
        for token in tokens:
            logprobs.tokens.append(self._service.texts.of(token.token_id))
            logprobs.token_logprobs.append(as_number(token.logprob))
            best = self._best(token.token_id, token.logprob, token.top_logprobs)
            logprobs.top_logprobs.append(best)
            logprobs.exit_layers.append(token.exit_layer)
            logprobs.confidences.append(token.confidence)
            if logprobs.heads is not None:
                logprobs.heads.append(self._service.texts.heads(token.heads))
            logprobs.text_offset.append(self._echoed[index] + token.offset)

    def _best(
        self, token_id: int, logprob: float, best: Sequence[tuple[int, float]]
    ) -> dict[str, float]:
        """The most probable tokens and the chosen one. Where several have the same name, the most
        probable one keeps it, and the others are named by their numbers."""
        found: dict[str, float] = {}
        tokens = dict((*best, (token_id, logprob)))
        for one in sorted(tokens, key=tokens.__getitem__, reverse=True):
            name = self._service.texts.of(one)
            name = as_token_id(one) if name in found else name
            found[name] = as_number(tokens[one])
        return found
