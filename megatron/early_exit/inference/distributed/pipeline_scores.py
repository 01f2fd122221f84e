"""Texts that the stages of a pipeline score, piece by piece."""

from collections.abc import Iterable
from dataclasses import asdict

from megatron.early_exit.inference.distributed.control import Message
from megatron.early_exit.inference.engine.scoring import Piece, PrefixScore, ScoringRule, TextScores
from megatron.early_exit.inference.modes.rule import ExitRule


def order_message(key: int, scoring: TextScores, piece: Piece) -> Message:
    """What has the stages score a piece of a request's prompt."""
    return {
        "kind": "score",
        "key": key,
        "length": len(scoring.tokens),
        "rule": asdict(scoring.rule),
        "piece": asdict(piece),
    }


def scores_message(key: int, scores: Iterable[PrefixScore], **where: int) -> Message:
    """What tells of scores of a request's prompt, and what else there is to say of them."""
    return {"kind": "scored", "key": key, "scores": [asdict(score) for score in scores], **where}


def rule_of(order: Message) -> ScoringRule:
    """How the text of an order is to be scored."""
    rule = order["rule"]
    return ScoringRule(**{**rule, "exit_rule": ExitRule.from_message(rule["exit_rule"])})


def piece_of(order: Message) -> Piece:
    """The piece of an order."""
    piece = order["piece"]
    return Piece(**{**piece, "tokens": tuple(piece["tokens"])})


def scores_of(message: Message) -> list[PrefixScore]:
    """The scores in a `scores_message`."""
    return [
        PrefixScore(**{**score, "top_logprobs": tuple(map(tuple, score["top_logprobs"]))})
        for score in message["scores"]
    ]


class PiecesUnderWay:
    """What the stages have said so far of pieces that are on their way through them.

    Every stage tells of every piece: of the positions that one of its exits is sure of, the last
    stage of all.

    Attributes:
        num_pieces: how many are on their way.
    """

    def __init__(self, num_stages: int) -> None:
        self.num_pieces = 0
        self._num_stages = num_stages
        self._heard: dict[tuple[int, int], dict[int, list[PrefixScore]]] = {}

    def add(self) -> None:
        """A piece starts."""
        self.num_pieces += 1

    def hear(
        self, key: int, start: int, stage: int, scores: list[PrefixScore]
    ) -> list[PrefixScore] | None:
        """A stage tells of the piece of a request's prompt that begins at `start`.

        Returns:
            The scores of the piece, of each position that of the first head that is sure; None
            while other stages have yet to tell.
        """
        heard = self._heard.setdefault((key, start), {})
        heard[stage] = scores
        if len(heard) < self._num_stages:
            return None
        self.num_pieces -= 1
        del self._heard[key, start]
        first: dict[int, PrefixScore] = {}
        for number in range(self._num_stages):
            for score in heard[number]:
                first.setdefault(score.position, score)
        return list(first.values())
