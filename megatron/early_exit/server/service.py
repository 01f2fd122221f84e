"""What every endpoint that generates text needs: the model by name, and the way to the engine."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flask import Response, g, request
from pydantic import BaseModel

from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.server.bodies.token_texts import TokenTexts
from megatron.early_exit.server.engine_thread.job import ClientGone, Job
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.http.errors import ApiError
from megatron.early_exit.server.model_names import ServedModel
from megatron.early_exit.server.request_log import note_end
from megatron.early_exit.server.settings import ServerSettings

_LOG = logging.getLogger(__name__)
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
        self.model = ServedModel(
            settings.model_name, settings.exits, engine.exit_layers, engine.num_mtp_depths
        )
        self.tokenizer = engine.tokenizer
        self.texts = TokenTexts(engine.tokenizer)
        self.num_layers = engine.num_layers
        self.exit_measure, self.exit_measures = engine.exit_measure, engine.exit_measures
        self.stored_rule = engine.stored_rule
        self.vocab_size = engine.vocab_size
        self.max_model_len = engine.max_sequence_length

    def encode_all(
        self,
        prompts: Sequence[str | list[int]],
        answers: int,
        param: str,
        room: int,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """The tokens of a request's prompts; see `encode`.

        Args:
            prompts: texts, or token ids.
            answers: texts per prompt; all together may be as many as `max_sequences`.
            param: the request's field that holds the prompts.
            room: tokens of the context that the prompts leave free at least.
            add_special_tokens: whether the tokenizer frames texts as it does for prompts.

        Raises:
            ApiError: there are too many, or one of them is refused.
        """
        most, count = self.settings.max_sequences, len(prompts) * answers
        if count > most:
            message = f"{param}: asks for {count} texts, allowed: up to {most} in a request"
            raise ApiError(400, message, param)
        return [self.encode(prompt, param, room, add_special_tokens) for prompt in prompts]

    def encode_text(self, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, however many.

        Raises:
            ApiError: the model knows no text, or it is too long by far.
        """
        if self.tokenizer is None:
            raise ApiError(400, f"{param}: the model knows no text, allowed: token ids", param)
        if len(text) > _LONGEST_TOKEN * self.max_model_len:
            raise self._too_long(param, f"{len(text)} characters", self.max_model_len)
        return self.tokenizer.encode(text, add_special_tokens)

    def encode(
        self, prompt: str | list[int], param: str, room: int, add_special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a prompt.

        Args:
            param: the field that it came in, for errors.
            room: tokens that must have room behind it.
            add_special_tokens: frame a text as the tokenizer does.

        Raises:
            ApiError: it is empty, too long, or has unknown tokens.
        """
        longest = self.max_model_len - room
        if isinstance(prompt, str):
            tokens = self.encode_text(prompt, param, add_special_tokens)
        else:
            tokens = prompt
            unknown = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if unknown is not None:
                known = f"0 to {self.vocab_size - 1}"
                message = f"{param}: token {unknown} is unknown, allowed: {known}"
                raise ApiError(400, message, param)
        if not tokens:
            raise ApiError(400, f"{param}: is empty, allowed: 1 token or more", param)
        if len(tokens) > longest:
            raise self._too_long(param, f"{len(tokens)} tokens", longest)
        return tokens

    def check_limit(self, name: str, value: int | None, prompts: Sequence[list[int]]) -> None:
        """Refuse more tokens than the context has room for behind the longest prompt.

        Args:
            name: the field.
            value: None where the request leaves it out: then a text gets what fits.

        Raises:
            ApiError: they do not fit.
        """
        longest = max(map(len, prompts))
        room = self.max_model_len - longest
        if value is not None and value > room:
            message = (
                f"{name} {value}: does not fit behind a prompt of {longest} tokens in a context of "
                f"{self.max_model_len}, allowed: up to {room}"
            )
            raise ApiError(400, message, name, "context_length_exceeded")

    def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, answers: int, is_streamed: bool
    ) -> Job:
        """Hand sequences to the engine, and wait until it has taken them in.

        Args:
            prompts: their tokens.
            params: how to continue each.
            answers: to each prompt; with a seed, each has one of its own, counted upwards.
            is_streamed: tokens are wanted as they come.

        Raises:
            ApiError: the engine does not take them.
            ClientGone: the client has not waited for it.
        """
        copies = [_with_seed(params, i) for i in range(answers)]
        job = Job(
            [prompt for prompt in prompts for _ in range(answers)],
            [copy for _ in prompts for copy in copies],
            self.settings.request_timeout,
            is_streamed,
        )
        g.outcome["mode"] = params.mode
        g.outcome["prompt_tokens"] = sum(map(len, prompts))
        self.worker.submit(job)
        try:
            job.wait_for_begin(client_is_gone())
        except (ClientGone, ApiError):
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
        except (ClientGone, ApiError):
            self.worker.cancel(job)
            raise
        finally:
            note_end(g.outcome, job)

    def stream(self, job: Job, events: Iterator[str]) -> Response:
        """Send what `events` makes of a job as server-sent events."""
        outcome: dict[str, object] = g.outcome

        def lines() -> Iterator[str]:
            try:
                for event in events:
                    yield f"data: {event}\n\n"
                # Before the last event: those that have it hang up at once.
                outcome["end"] = "done"
                yield "data: [DONE]\n\n"
            except ApiError as error:
                outcome["end"], outcome["reason"] = error.body.error.code, error.logged
                yield f"data: {error.body.model_dump_json()}\n\n"
            except ClientGone:
                outcome["end"] = "client_gone"
            except GeneratorExit:
                outcome.setdefault("end", "client_gone")
                raise
            except Exception as error:
                _LOG.exception("a stream could not be made")
                outcome["end"] = "internal"
                broken = ApiError(500, f"{type(error).__name__} in the server", code="internal")
                yield f"data: {broken.body.model_dump_json()}\n\n"
            finally:
                note_end(outcome, job)
                self.worker.cancel(job)

        return Response(lines(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @staticmethod
    def _too_long(param: str, length: str, longest: int) -> ApiError:
        message = f"{param}: is too long with {length}, allowed: up to {longest} tokens"
        return ApiError(400, message, param, "context_length_exceeded")


def _with_seed(params: SamplingParams, answer: int) -> SamplingParams:
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + answer) % 2**63)


def answer(body: BaseModel) -> Response:
    """A whole body."""
    return Response(body.model_dump_json(), mimetype="application/json")


def client_is_gone() -> Callable[[], bool]:
    """Tells whether the client of this request has closed its connection."""
    check: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return check
