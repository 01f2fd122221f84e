"""What every endpoint that generates text needs: the model by name, and the way to the engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flask import Response, request
from pydantic import BaseModel

from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.server.errors import ApiError
from megatron.early_exit.server.job import ClientGone, Job
from megatron.early_exit.server.names import ServedModel
from megatron.early_exit.server.settings import ServerSettings
from megatron.early_exit.server.token_texts import TokenTexts
from megatron.early_exit.server.worker import EngineWorker

_LONGEST_TOKEN = 256
"""Characters; a text of more per token of the context is too long without being looked at."""


class Service:
    """The engine as the endpoints see it.

    Args:
        worker: owns the engine.
        settings: the operator's.

    Attributes:
        model: the model, by its names.
        texts: what its tokens look like.
    """

    def __init__(self, worker: EngineWorker, settings: ServerSettings) -> None:
        engine = worker.engine
        self.worker, self.settings = worker, settings
        self.model = ServedModel(settings.model_name, settings.exits, engine.exit_layers)
        self.tokenizer = engine.tokenizer
        self.texts = TokenTexts(engine.tokenizer)
        self.num_layers = engine.num_layers
        self.vocab_size = engine.vocab_size
        self.max_model_len = engine.max_sequence_length

    def encode(self, prompt: str | list[int], param: str, room: int) -> list[int]:
        """The tokens of a prompt.

        Args:
            param: the field that it came in, for errors.
            room: tokens that must have room behind it.

        Raises:
            ApiError: it is empty, too long, or has unknown tokens.
        """
        longest = self.max_model_len - room
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ApiError(400, f"{param}: the model knows no text, allowed: token ids", param)
            if len(prompt) > _LONGEST_TOKEN * self.max_model_len:
                raise self._too_long(param, f"{len(prompt)} characters", longest)
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = prompt
            unknown = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if unknown is not None:
                raise ApiError(
                    400,
                    f"{param}: token {unknown} is unknown, allowed: 0 to {self.vocab_size - 1}",
                    param,
                )
        if not tokens:
            raise ApiError(400, f"{param}: is empty, allowed: 1 token or more", param)
        if len(tokens) > longest:
            raise self._too_long(param, f"{len(tokens)} tokens", longest)
        return tokens

    def submit(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        answers: int,
        param: str,
        is_streamed: bool,
    ) -> Job:
        """Hand sequences to the engine, and wait until it has taken them in.

        Args:
            prompts: their tokens.
            params: how to continue each.
            answers: to each prompt; with a seed, each has one of its own, counted upwards.
            param: the field of the prompts, for errors.
            is_streamed: tokens are wanted as they come.

        Raises:
            ApiError: there are too many, or the engine does not take them.
            ClientGone: the client has not waited for it.
        """
        most, count = self.settings.max_sequences, len(prompts) * answers
        if count > most:
            raise ApiError(
                400, f"{param}: asks for {count} texts, allowed: up to {most} in a request", param
            )
        seeds = [params.seed if params.seed is None else params.seed + i for i in range(answers)]
        copies = [params if seed is None else replace(params, seed=seed) for seed in seeds]
        job = Job(
            [prompt for prompt in prompts for _ in range(answers)],
            [copy for _ in prompts for copy in copies],
            self.settings.request_timeout,
            is_streamed,
        )
        self.worker.submit(job)
        try:
            job.wait_for_begin(client_is_gone())
        except ClientGone:
            self.worker.cancel(job)
            raise
        return job

    def finish(self, job: Job) -> None:
        """Wait until a job has ended.

        Raises:
            ApiError: there is no whole answer.
            ClientGone: the client has not waited for it.
        """
        try:
            for _ in job.tokens(client_is_gone()):
                pass
        except ClientGone:
            self.worker.cancel(job)
            raise

    def stream(self, job: Job, events: Iterator[str]) -> Response:
        """Send what `events` makes of a job as server-sent events."""

        def lines() -> Iterator[str]:
            try:
                for event in events:
                    yield f"data: {event}\n\n"
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield f"data: {error.body.model_dump_json()}\n\n"
            except ClientGone:
                return
            finally:
                self.worker.cancel(job)

        return Response(lines(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @staticmethod
    def _too_long(param: str, length: str, longest: int) -> ApiError:
        message = f"{param}: is too long with {length}, allowed: up to {longest} tokens"
        return ApiError(400, message, param, "context_length_exceeded")


def answer(body: BaseModel) -> Response:
    """A whole body."""
    return Response(body.model_dump_json(), mimetype="application/json")


def client_is_gone() -> Callable[[], bool]:
    """Tells whether the client of this request has closed its connection."""
    check: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return check
