"""A measure of confidence that the package does not have, and the tokens that a model gives with
it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.inference.modes.head_output import HeadOutput
from tests.helpers.reference_decoder import all_logits
from tests.helpers.tiny_models import TinyModel


def margin(output: HeadOutput) -> float:
    """The difference between the probabilities of the two most probable tokens."""
    first, second = output.logits.softmax(-1).topk(2).values.tolist()
    return float(first - second)


def margin_tokens(
    model: TinyModel, tokens: Sequence[int], threshold: float
) -> list[tuple[int, int, float]]:
    """For each prefix of a text, the next token, the layer of the head that gives it, and that
    head's confidence: the margin at an exit, the largest probability at the final head."""
    logits = all_logits(model, tokens)
    found = []
    for position in range(len(tokens)):
        for layer in (*model.early_exit.positions, None):
            probabilities = (
                logits["final" if layer is None else layer][position].double().softmax(-1)
            )
            (first, second), (token, _) = (v.tolist() for v in probabilities.topk(2))
            if layer is None:
                found.append((token, model.architecture.num_layers, first))
            elif first - second >= threshold:
                found.append((token, layer, first - second))
                break
    return found
