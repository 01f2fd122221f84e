"""Many prompts at a time, each alone or beside mode `full`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from megatron.early_exit.client.completions import (
    Completion,
    CompletionClient,
    RequestFailed,
)

_EXIT_FIELDS = ("mode", "early_exit_threshold", "exit_layers")


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt: an answer, with another one in mode `full` if wanted, or an error.

    Attributes:
        prompt: the prompt.
        answer: None where there is an error.
        full: in mode `full`; None where there is an error or it was not wanted.
        error: why there is no answer.
    """

    prompt: str
    answer: Completion | None = None
    full: Completion | None = None
    error: str | None = None

    def line(self) -> dict[str, Any]:
        """The outcome as an object of a JSON file."""
        found: dict[str, Any] = {"prompt": self.prompt, "error": self.error}
        if self.answer is not None:
            found |= _fields(self.answer)
        if self.full is not None:
            found["full"] = _fields(self.full)
        return found


def ask(
    client: CompletionClient,
    body: dict[str, Any],
    prompts: Sequence[str],
    concurrency: int,
    compare_with: str | None,
) -> Iterator[Outcome]:
    """What comes of each prompt, in their order, as soon as it and those before it are there.

    Args:
        client: knows the server.
        body: the request without its prompt.
        prompts: the prompts.
        concurrency: requests at a time.
        compare_with: ask each of this model as well, right after the first answer, without what the
            request says of exits; None compares with nothing.

    Raises:
        Unreachable: the server has gone away.
    """
    in_full = {name: value for name, value in body.items() if name not in _EXIT_FIELDS}

    def complete(prompt: str) -> Outcome:
        try:
            answer = client.complete({**body, "prompt": prompt})
            full = None
            if compare_with is not None:
                full = client.complete({**in_full, "model": compare_with, "prompt": prompt})
        except RequestFailed as error:
            return Outcome(prompt, error=str(error))
        return Outcome(prompt, answer, full)

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            yield from pool.map(complete, prompts)
        except BaseException:
            client.close()
            raise


def _fields(answer: Completion) -> dict[str, Any]:
    return {**asdict(answer), "mean_exit_layer": answer.mean_exit_layer}
