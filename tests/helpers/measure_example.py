"""A measure of confidence that the package does not have, and the tokens that a model gives with
it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron.early_exit.inference.modes.measures import Evidence
from tests.helpers.reference_decoder import all_logits
from tests.helpers.tiny_models import TinyModel


def duel(heads: Evidence) -> Tensor:
    """The probability of the best token, where only the best two could be given."""
    return heads.logits.topk(2).values.softmax(-1)[:, 0]


def duel_tokens(
    model: TinyModel, tokens: Sequence[int], threshold: float
) -> list[tuple[int, int, float]]:
    """For each prefix of a text, the next token, the layer of the head that gives it, and that
    head's confidence."""
    logits = all_logits(model, tokens)
    found = []
    for position in range(len(tokens)):
        for layer in (*model.early_exit.positions, None):
            probabilities = (
                logits["final" if layer is None else layer][position].double().softmax(-1)
            )
            (first, second), (token, _) = (v.tolist() for v in probabilities.topk(2))
            confidence = first / (first + second)
            if layer is None:
                found.append((token, model.architecture.num_layers, confidence))
            elif confidence >= threshold:
                found.append((token, layer, confidence))
                break
    return found
