"""What an answer has left undone: deeper layers of positions that no later token has needed."""

import time
from collections.abc import Sequence

from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.inference import EarlyExitEngine


def num_waiting(
    exit_layers: Sequence[int], num_prompt_tokens: int, num_layers: int, max_pending: int
) -> int:
    """The number of positions that the last layers have not computed when an answer ends.

    Keys and values of a position that leaves at an exit are made with a later token that goes
    through all layers (see `EarlyExitMode`), of which an answer's end has none. Exits in the middle
    have computed some layers of them: all are counted as if they had computed none.

    Args:
        exit_layers: number of layers behind the choice of each token.
        num_prompt_tokens: positions that wait with the first token, where that leaves.
        num_layers: of the model.
        max_pending: see `EarlyExitMode`.
    """
    waiting = 0
    for place, layer in enumerate(exit_layers):
        if layer == num_layers or waiting >= max_pending:
            waiting = 0
        else:
            waiting += num_prompt_tokens if place == 0 else 1
    return waiting


def waiting_tokens(
    prompt: Sequence[int],
    answer: Sequence[int],
    exit_layers: Sequence[int],
    rule: Rule,
    engine: EarlyExitEngine,
) -> list[int]:
    """The tokens at the positions that wait when an answer by a rule ends.

    Args:
        prompt: the tokens in front of the answer.
        answer: its tokens; the last one has not been in the model.
        exit_layers: number of layers behind the choice of each of them.
        rule: how they were chosen. With propagated caches nothing waits, nor does it for the full
            model.
        engine: that has answered.
    """
    if rule == FULL or rule.kv_policy == "propagate":
        return []
    count = num_waiting(exit_layers, len(prompt), engine.num_layers, engine.max_pending)
    computed = [*prompt, *answer[:-1]]
    return computed[len(computed) - count :]


def catch_up_seconds(engine: EarlyExitEngine, waiting: Sequence[Sequence[int]]) -> float:
    """The time that the full model takes for as many positions, as prompts in one batch.

    That is an estimate of what is left undone: it has the first layers too, which were computed,
    and not the attention to what stands before.

    Args:
        engine: of the model.
        waiting: tokens of each answer's waiting positions; those without any cost nothing.

    Raises:
        FloatingPointError: the model computes numbers that are not finite.
    """
    texts = [list(one) for one in waiting if one]
    if not texts:
        return 0.0
    start = time.perf_counter()
    results = engine.generate(texts, FULL.params(max_tokens=1, ignore_eos=True))
    seconds = time.perf_counter() - start
    for one in results:
        if one.error is not None:
            raise FloatingPointError(one.error)
    return seconds
