"""What the full model thinks of given text: probabilities of tokens that are already there."""

from collections.abc import Iterator, Sequence

import torch

from megatron.early_exit.inference.confidence import Assessment, assess
from megatron.early_exit.inference.passes import Span
from megatron.early_exit.inference.results import PromptToken
from megatron.early_exit.inference.runner import SegmentRunner
from megatron.early_exit.inference.segments import SegmentedModel

_CHUNK = 256
"""Positions at a time: logits of a whole context would fill the memory."""


def assess_prompt(model: SegmentedModel, tokens: Sequence[int]) -> Iterator[Assessment]:
    """The full model's assessment of the token behind every prefix, in one pass over all."""
    with torch.inference_mode():
        runner = SegmentRunner(model, num_slots=1, capacity=len(tokens))
        for start in range(0, len(tokens), _CHUNK):
            end = min(start + _CHUNK, len(tokens))
            for index in range(len(model.segments)):
                hidden = runner.run(index, [Span(0, start, end)], tokens[start:end])
            yield from assess(runner.final_logits(hidden))


def score_prompt(model: SegmentedModel, tokens: Sequence[int], num_best: int) -> list[PromptToken]:
    """The score of every token of a prompt.

    Args:
        num_best: most probable tokens to give in each place.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    scores = [PromptToken(tokens[0], None)]
    for token, assessment in zip(tokens[1:], assess_prompt(model, tokens), strict=False):
        if not assessment.is_finite:
            raise FloatingPointError("the model's logits are not finite numbers")
        top = assessment.top_logprobs(num_best) if num_best else ()
        scores.append(PromptToken(token, assessment.logprob(token), top))
    return scores
