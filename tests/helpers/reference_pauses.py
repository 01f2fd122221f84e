"""When exits pause by `exits_pay_at`: the definition, followed from the first token each time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron.early_exit.inference.modes import pauses
from tests.helpers.tiny_models import TinyModel

SHORT_PAUSES = {"MOST_LOST": 0.05, "CREDIT": 0.0, "SHORTEST_PAUSE": 2, "LONGEST_PAUSE": 7}
"""What to put in the place of the constants of `pauses` for short texts of tiny models."""
ROWS, STEP, HEAD, MEMORY, PRIOR = 16, 0.02, 0.65, 20, 4


def asks_exits(
    model: TinyModel,
    asked: Collection[int],
    company: int,
    given_by: Sequence[int],
    is_gated: bool = False,
    is_held: bool = False,
) -> bool:
    """Whether the exits are asked for the next token.

    Args:
        model: which.
        asked: indices of the exits that the request enables.
        company: its `exits_pay_at`.
        given_by: for each token so far the segment whose head gave it.
        is_gated, is_held: measure and policy of the request.
    """
    balance, length, pause = pauses.CREDIT, pauses.SHORTEST_PAUSE, 0
    segments = len(model.early_exit.positions) + 1
    comes, gives = [0.5] * segments, [0.5] * segments
    counted = 0
    for segment in given_by:
        if pause:
            pause -= 1
            continue
        took, full = _times(model, asked, company, segment, comes, gives, is_gated, is_held)
        counted += 1
        balance = min(balance + 1 - took / full, 4)
        count = min(counted + PRIOR, MEMORY)
        comes = [p + ((s <= segment) - p) / count for s, p in enumerate(comes)]
        gives = [p + ((s == segment) - p) / count for s, p in enumerate(gives)]
        if balance == 4:
            length = pauses.SHORTEST_PAUSE
        if balance <= -pauses.MOST_LOST:
            pause, balance, length = length, 0.0, min(2 * length, pauses.LONGEST_PAUSE)
    return pause == 0


def _times(
    model: TinyModel,
    asked: Collection[int],
    company: int,
    segment: int,
    comes: Sequence[float],
    gives: Sequence[float],
    is_gated: bool,
    is_held: bool,
) -> tuple[float, float]:
    """What a token takes that the head behind a segment gives, and what it takes in mode full."""
    a, options = model.architecture, model.early_exit
    matrices = (
        weight.numel()
        for name, weight in model.weights.items()
        if name.startswith("decoder.layers.0.") and weight.dim() == 2
    )
    layer = sum(matrices)
    num_answers = options.exit_vocab_size or a.vocab_size
    exit_head = HEAD * num_answers * a.hidden_size + layer * options.use_exit_block
    final_head = HEAD * a.vocab_size * a.hidden_size
    step = STEP * layer * a.num_layers
    undone = 2 * a.num_query_groups * a.kv_channels * a.hidden_size / layer if is_held else 1.0

    def once(needs: bool, others_need: float) -> float:
        return (1.0 if needs else 1 - (1 - others_need) ** (company - 1)) / company

    took = 0.0
    ends = (*options.positions, a.num_layers)
    for one, end in enumerate(ends):
        weights = layer * (end - (ends[one - 1] if one else 0))
        is_run, is_last = one <= segment, one == len(ends) - 1
        took += weights * once(is_run, comes[one])
        took += weights * (1 if is_run else undone) / ROWS
        if one in asked or is_last:
            took += step * once(is_run, comes[one])
            head = final_head if is_last else exit_head
            if is_gated:
                took += head * (once(one == segment, gives[one]) + (one == segment) / ROWS)
            else:
                took += head * (once(is_run, comes[one]) + is_run / ROWS)
    whole = layer * a.num_layers + final_head
    return took, step / company + whole * (1 / company + 1 / ROWS)
