"""The requests of `serve_load.py`, their expected answers, and the engine without a server."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from serve_models import WORDS

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams

NUM_DISTINCT = 64
CANCELLED = 0.2
"""Share of the streams (half of all requests) in which the client disconnects in the middle."""
_LOGPROBS_APART = 1e-3
"""Sums of a batch are rounded otherwise than those of one sequence."""
_WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "full"},
    {"mode": "early_exit", "early_exit_threshold": 0.0},
    {"mode": "early_exit", "early_exit_threshold": 0.3},
    {"mode": "early_exit", "early_exit_threshold": 0.8},
    {"mode": "self_speculative", "draft_confidence": 0.4},
    {"mode": "self_speculative", "draft_confidence": 0.1},
)


@dataclass(frozen=True)
class Question:
    """One of the distinct requests.

    Attributes:
        prompt: a text.
        params: how to continue it.
        body: the same as a body for the server.
        answer: the text that the request gets alone.
        n: the number of texts that it asks for.
        logprobs: those of the prompt's tokens, if the request asks only for these.
    """

    prompt: str
    params: SamplingParams
    body: bytes
    answer: str
    n: int = 1
    logprobs: tuple[float | None, ...] | None = None

    def accepts(self, choices: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the expected choices."""
        if len(choices) != self.n or any(one["text"] != self.answer for one in choices):
            return False
        if self.logprobs is None:
            return True
        found = choices[0]["logprobs"]["token_logprobs"]
        return len(found) == len(self.logprobs) and all(
            a is b if a is None or b is None else abs(a - b) < _LOGPROBS_APART
            for a, b in zip(found, self.logprobs, strict=True)
        )


@dataclass(frozen=True)
class Item:
    """A question as one client asks it.

    Attributes:
        question: the request.
        is_streamed: whether the answer is a stream.
        cancel_after: the number of events of a stream after which the client disconnects (of
            tokens, for the engine); None if it stays until the end.
    """

    question: Question
    is_streamed: bool
    cancel_after: int | None


def make_questions(engine: EarlyExitEngine) -> list[Question]:
    """Requests of all lengths and modes, each answered alone."""
    generator = random.Random(0)
    words = WORDS.split()
    questions = []
    for number in range(NUM_DISTINCT):
        way = _WAYS[number % len(_WAYS)]
        prompt = " ".join(generator.choices(words, k=generator.choice((1, 4, 16, 64))))
        common: dict[str, Any] = {
            "max_tokens": generator.choice((4, 16, 48, 96)),
            "ignore_eos": True,
        }
        params = SamplingParams(**way, **common)
        body = {"prompt": prompt, "temperature": 0, **way, **common}
        (result,) = engine.generate(prompt, params)
        assert result.text is not None
        questions.append(Question(prompt, params, json.dumps(body).encode(), result.text))
    return questions


def endless_items(questions: Sequence[Question], seed: int) -> Iterator[Item]:
    """Questions in random order."""
    generator = random.Random(seed)
    while True:
        question = generator.choice(questions)
        is_streamed = generator.random() < 0.5
        most = question.params.max_tokens // 2
        is_cancelled = is_streamed and generator.random() < CANCELLED
        yield Item(question, is_streamed, generator.randint(1, most) if is_cancelled else None)


def answer_all(engine: EarlyExitEngine, items: Sequence[Item], num_clients: int) -> float:
    """Let the engine itself answer, with as many requests at a time as clients; returns seconds."""
    begin = perf_counter()
    waiting = iter(items)
    running: dict[int, Item] = {}
    while True:
        while len(running) < num_clients and (item := next(waiting, None)) is not None:
            request = engine.submit(item.question.prompt, item.question.params)
            running[request.key] = item
        if not running:
            return perf_counter() - begin
        for key, request in {request.key: request for request, _ in engine.step()}.items():
            last = running[key].cancel_after
            if last is not None and len(request.tokens) >= last:
                engine.cancel(request)
            if request.is_finished:
                del running[key]
