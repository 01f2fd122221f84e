"""What heads say of texts that are given to them."""

from collections.abc import Sequence

from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.results import PromptToken


def score(
    engine: EarlyExitEngine, tokens: Sequence[int], rule: Rule = FULL
) -> tuple[PromptToken, ...]:
    """Score every token of a text but the first, in one pass, by the head that the rule takes.

    Args:
        engine: of the model.
        tokens: the text, 2 tokens or more.
        rule: which head scores a position.

    Returns:
        One score for each token behind the first, with the token that the head finds best there.

    Raises:
        FloatingPointError: logits are not finite: damaged weights, or an overflow.
        ValueError: the text does not fit into the model's context.
    """
    (result,) = engine.generate([list(tokens)], rule.params(max_tokens=0, prompt_logprobs=1))
    if result.error is not None:
        raise FloatingPointError(result.error)
    assert result.prompt_tokens is not None
    return tuple(result.prompt_tokens[1:])


def best_token(score: PromptToken) -> int:
    """The token that the head finds most probable in the place of a scored one."""
    return score.top_logprobs[0][0]


_MOST_TEXTS = 256
"""Texts whose judgement is kept: more than a prompt has answers by all thresholds."""


class Judge:
    """Tells what the full model thinks of the tokens of an answer.

    A text that comes again is not evaluated again, because answers at neighbouring thresholds are
    often equal. The last 256 texts are kept.

    Args:
        engine: of the full model.
    """

    def __init__(self, engine: EarlyExitEngine) -> None:
        self.engine = engine
        self._found: dict[tuple[int, ...], list[tuple[bool, float]]] = {}

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[bool, float]]:
        """For each token of the answer, whether the full model would choose it after the same
        text, and its log-probability by that.

        Args:
            prompt: the tokens in front of the answer.
            answer: the tokens that are judged.

        Raises:
            FloatingPointError: logits are not finite.
        """
        text = (*prompt, *answer)
        if text not in self._found:
            if len(self._found) >= _MOST_TEXTS:
                del self._found[next(iter(self._found))]
            self._found[text] = [
                (one.token_id == best_token(one), one.logprob)
                for one in score(self.engine, text)[len(prompt) - 1 :]
                if one.logprob is not None
            ]
        return self._found[text]
