"""What one request asks of its tokens' choice, and its random numbers. Holds no tensors."""

import random
import secrets
from collections import deque
from collections.abc import Iterable, Sequence

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.inference.modes.token_counts import TokenCounts
from megatron.early_exit.inference.params import SamplingParams


class Sampler:
    """How the tokens of one request are chosen.

    Randomness comes from the request's own generator on the host: one number for each draw,
    whatever the vocabulary, the device and other requests are.

    Args:
        params: the request.
        prompt_token_ids: the tokens before the first generated one.
        stop_token_ids: what is forbidden before `params.min_tokens`.
        vocab_size: number of logits, v.

    Attributes:
        num_taken: random numbers that have been taken.
        is_always_greedy: each token is that of the largest logit.
        is_adjusted: the logits may be changed before anything is drawn from them.
        is_limited: some tokens may be ruled out because others are more probable.
        counts: the tokens that penalties are for; None where there are no penalties.

    Raises:
        FieldError: `params.min_tokens` forbids every token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.num_taken = 0
        self._random = random.Random(self.seed)
        self._ahead: deque[float] = deque()
        self._forbidden = tuple(sorted({token for token in stop_token_ids if token < vocab_size}))
        if params.min_tokens > 0 and len(self._forbidden) == vocab_size:
            allowed = f"0 where all of the model's {vocab_size} tokens end the sequence"
            raise out_of_range("min_tokens", params.min_tokens, allowed)
        self._takes_largest_logit = params.takes_largest_logit
        self.is_always_greedy = self._takes_largest_logit and not self.forbidden(0)
        self.is_adjusted = params.changes_logits or bool(self.forbidden(0))
        self.is_limited = bool(params.min_p or params.top_k) or params.top_p_decay < 1
        self.is_limited |= params.top_p < 1
        repeats = params.repetition_penalty != 1.0
        self.counts: TokenCounts | None = None
        if repeats or params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts(prompt_token_ids if repeats else ())

    def is_greedy(self, num_generated: int) -> bool:
        """Whether the token behind so many generated ones is that of the largest logit."""
        return self._takes_largest_logit and not self.forbidden(num_generated)

    def forbidden(self, num_generated: int) -> Sequence[int]:
        """The tokens that cannot come behind so many generated ones."""
        return self._forbidden if num_generated < self.params.min_tokens else ()

    def top_p(self, num_generated: int) -> float:
        """`top_p` behind so many generated tokens."""
        params = self.params
        return max(params.top_p * params.top_p_decay**num_generated, params.top_p_bound)

    def number(self, index: int) -> float:
        """A random number of the request from 0 to 1: 0 <= u <= 1 - 2**-52.

        Args:
            index: of the number in the request, at least `num_taken`: one that has not been taken.
        """
        while self.num_taken + len(self._ahead) <= index:
            self._ahead.append(self._random.getrandbits(52) / 2**52)
        return self._ahead[index - self.num_taken]

    def take_numbers(self, count: int) -> None:
        """Take the next numbers; they are not used again."""
        for _ in range(count):
            self.number(self.num_taken)
            self._ahead.popleft()
            self.num_taken += 1
