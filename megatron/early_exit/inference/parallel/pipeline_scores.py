"""Scores on their way from the last stage of a pipeline to the ranks that wait for them."""

from collections.abc import Sequence
from dataclasses import asdict

from megatron.early_exit.inference.decoding.scoring import PrefixScore
from megatron.early_exit.inference.parallel.control import Message


def scores_message(number: int, scores: Sequence[PrefixScore]) -> Message:
    """As JSON values.

    Args:
        number: of the text, see `ExpectedScores`.
        scores: of its prefixes.
    """
    return {"kind": "scored", "number": number, "scores": [asdict(score) for score in scores]}


class ExpectedScores:
    """What one rank has heard of scores.

    Texts are numbered: all ranks score the same ones in the same order, each in its own time.
    """

    def __init__(self) -> None:
        self._last_number = 0
        self._heard: dict[int, list[PrefixScore]] = {}

    def expect(self) -> int:
        """The number of the next text."""
        self._last_number += 1
        return self._last_number

    def hear(self, message: Message) -> None:
        """Keep scores until they are taken."""
        self._heard[message["number"]] = [
            PrefixScore(**{**score, "top_logprobs": tuple(map(tuple, score["top_logprobs"]))})
            for score in message["scores"]
        ]

    def take(self, number: int) -> list[PrefixScore] | None:
        """The scores of a text; None where they have not come yet."""
        return self._heard.pop(number, None)
