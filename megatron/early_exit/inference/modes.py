"""Decoding modes: how the next token of a sequence comes about.

All modes are one interface over the segments of a model. What they share: the token is chosen by
`Sampler` from the head that the mode decides on.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron.early_exit.inference.confidence import Assessment, assess
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.sampling import sample
from megatron.early_exit.inference.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token and where it comes from."""

    token_id: int
    logprob: float
    confidence: float
    exit_layer: int


class Sampler:
    """Chooses a token from what a head says, as a request asks for it.

    Args:
        params: the request.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def choose(self, assessment: Assessment, exit_layer: int) -> Choice:
        """The token that the head of `exit_layer` gives."""
        token, logprob = assessment.best_token, assessment.best_logprob
        params = self.params
        if params.temperature > 0:
            token = sample(
                assessment.logprobs,
                params.temperature,
                params.top_k,
                params.top_p,
                self.generator,
            )
            logprob = float(assessment.logprobs[token])
        return Choice(token, logprob, assessment.confidence, exit_layer)


class DecodingMode(Protocol):
    """Runs what has to be run of a sequence to choose its next token."""

    def next_token(self, sequence: Sequence, sampler: Sampler) -> Choice:
        """Choose the token behind the last one of `sequence`, which is not changed by it.

        Raises:
            FloatingPointError: the logits are not finite.
        """
        ...


class FullMode:
    """All layers, for every token."""

    def next_token(self, sequence: Sequence, sampler: Sampler) -> Choice:
        for index in range(len(sequence.model.segments)):
            sequence.run_segment(index)
        assessment = assess(sequence.final_logits())
        return sampler.choose(assessment, sequence.model.architecture.num_layers)


class EarlyExitMode:
    """The first exit that is confident enough, else the final head.

    Segments behind the exit are not run. When a later token goes deeper, the positions that wait in
    front of a segment go through it together with that token, so every key and value is what the
    full model computes, and none is computed twice (hidden states kept at the exit as in FREE,
    arXiv 2310.05424).

    Args:
        threshold: least confidence to leave.
        exit_layers: the exits to ask, by their number of backbone layers.
        max_pending: when this many positions wait, the next token takes them through all segments
            whatever its exit says; that bounds the time of the longest step.
    """

    def __init__(self, threshold: float, exit_layers: frozenset[int], max_pending: int) -> None:
        self.threshold = threshold
        self.exit_layers = exit_layers
        self.max_pending = max_pending

    def next_token(self, sequence: Sequence, sampler: Sampler) -> Choice:
        model = sequence.model
        goes_through = sequence.num_pending >= self.max_pending
        choice: Choice | None = None
        for index, exit_ in enumerate(model.exits):
            sequence.run_segment(index)
            if choice is not None or exit_.position not in self.exit_layers:
                continue
            assessment = assess(sequence.exit_logits(index))
            if assessment.confidence >= self.threshold:
                choice = sampler.choose(assessment, exit_.position)
                if not goes_through:
                    return choice
        sequence.run_segment(len(model.exits))
        if choice is not None:
            return choice
        assessment = assess(sequence.final_logits())
        return sampler.choose(assessment, model.architecture.num_layers)
