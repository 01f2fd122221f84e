"""What the full model thinks of given text: probabilities of tokens that are already there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.compute.segments import SegmentedModel
from megatron.early_exit.inference.compute.spans import Span
from megatron.early_exit.inference.decoding.confidence import Assessment, assess
from megatron.early_exit.inference.decoding.results import PromptToken

CHUNK = 256
"""Positions at a time: logits of a whole context would fill the memory."""


@dataclass(frozen=True, slots=True)
class PrefixScore:
    """What the full model says behind a prefix of a text."""

    best_token: int
    is_finite: bool
    """Whether the logits are numbers to judge by."""
    logprob: float | None
    """Logarithm of the probability of the token that follows; None behind the whole text."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, as many as were asked for."""

    @classmethod
    def of(cls, assessment: Assessment, token: int | None, num_best: int) -> "PrefixScore":
        """The score in an assessment, where `token` follows."""
        return cls(
            assessment.best_token,
            assessment.is_finite,
            None if token is None else assessment.logprob(token),
            assessment.top_logprobs(num_best) if num_best else (),
        )


def score_text(
    model: SegmentedModel,
    tokens: Sequence[int],
    num_best: int,
    receive: Callable[[int], Tensor] | None = None,
    send: Callable[[Tensor], None] | None = None,
) -> list[PrefixScore]:
    """Score every prefix of a text in one pass, with caches of its own.

    Args:
        model: the model, or a stage of it.
        tokens: the text.
        num_best: most probable tokens to give in each place.
        receive: gives the next n hidden states [n, h] of the stage before; None at the first one.
        send: takes the hidden states [n, h] for the next stage; None at the last one.

    Returns:
        A score for each prefix, the shortest first, at the last stage; elsewhere nothing.
    """
    runner = SegmentRunner(model, num_slots=1, capacity=len(tokens))
    scores: list[PrefixScore] = []
    with torch.inference_mode():
        for start in range(0, len(tokens), CHUNK):
            span = Span(0, start, min(start + CHUNK, len(tokens)))
            hidden = None if receive is None else receive(span.length)
            for index in range(len(model.segments)):
                hidden = runner.run(index, [span], tokens[start : span.end], hidden)
            assert hidden is not None
            if send is not None:
                send(hidden)
                continue
            assessments = assess(runner.final_logits(hidden))
            following = [*tokens[start + 1 : span.end + 1], None][: span.length]
            scores += [
                PrefixScore.of(assessment, token, num_best)
                for assessment, token in zip(assessments, following, strict=True)
            ]
    return scores


def prompt_tokens(tokens: Sequence[int], scores: Sequence[PrefixScore]) -> list[PromptToken]:
    """The score of every token of a prompt, from those of its prefixes."""
    behind = zip(tokens[1:], scores, strict=False)
    return [
        PromptToken(tokens[0], None),
        *(PromptToken(token, score.logprob, score.top_logprobs) for token, score in behind),
    ]
