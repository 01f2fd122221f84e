"""Sends many prompts at a time, each alone or also in mode `full`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from megatron.early_exit.client.completions import Completion, CompletionClient, RequestFailed

EXIT_FIELDS = (
    *("mode", "early_exit_threshold", "exit_layers", "kv_policy"),
    *("exit_measure", "exit_thresholds", "exit_threshold_decay", "exits_pay_at"),
)
"""The fields of requests about exits."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one prompt: an answer, also in mode `full` if that was requested, or an error.

    Attributes:
        prompt: the prompt.
        answer: the answer; None if there is an error.
        full: the answer in mode `full`; None if there is an error or it was not requested.
        error: the reason why there is no answer.
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
    """Yield the outcomes in the order of the prompts, each as soon as it is complete.

    Args:
        body: the request without its prompt.
        concurrency: requests at a time.
        compare_with: name of a model to which each prompt is sent again right after its first
            answer, without the fields about exits; None compares with nothing.

    Raises:
        Unreachable: the server has stopped.
    """
    in_full = {name: value for name, value in body.items() if name not in EXIT_FIELDS}

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
