"""From logits to a token.

The order is vLLM's (`vllm/v1/sample/sampler.py`): repetition penalty, bias and OpenAI's penalties,
forbidden tokens, temperature, then min-p, top-k and top-p, each on what the one before leaves.
Hugging Face's `transformers` has min-p last, all else that it has is the same.
"""

import math
import random
import secrets
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.inference.params import SamplingParams

_NUCLEI = (512, 16384)
"""How many tokens to order before the whole vocabulary is. Most nuclei are smaller than the first,
and ordering so few of 128k takes a thirtieth of the time."""


class Sampler:
    """Chooses the tokens of one request, as its parameters ask for it.

    Randomness comes from the request's own generator on the host: one number for each draw,
    whatever the vocabulary, the device and other requests are.

    Args:
        params: the request.
        prompt_token_ids: the tokens before the first generated one.
        stop_token_ids: what is forbidden before `params.min_tokens`.
        vocab_size: number of logits, v.
        device: where the logits are.

    Raises:
        FieldError: `params.min_tokens` forbids every token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._random = random.Random(self.seed)
        self._device = device
        forbidden = sorted({token for token in stop_token_ids if token < vocab_size})
        if params.min_tokens > 0 and len(forbidden) == vocab_size:
            allowed = f"0 where all of the model's {vocab_size} tokens end the sequence"
            raise out_of_range("min_tokens", params.min_tokens, allowed)
        self._forbidden = torch.tensor(forbidden, dtype=torch.int64, device=device)
        tokens, values = zip(*params.logit_bias, strict=True) if params.logit_bias else ((), ())
        self._bias = (
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(values, dtype=torch.float32, device=device),
        )
        self._prompt = torch.tensor(
            sorted(set(prompt_token_ids)) if params.repetition_penalty != 1.0 else [],
            dtype=torch.int64,
            device=device,
        )

    def is_greedy(self, num_generated: int) -> bool:
        """Whether the token behind so many generated ones is that of the largest logit."""
        return self.params.takes_largest_logit and not self._forbids(num_generated)

    def distribution(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        """The probabilities from which the token behind `generated` is drawn.

        Depends on nothing but its arguments and the request, so it may be asked for positions that
        are only drafted.

        Args:
            logits: [v]; log-probabilities do as well where there is no repetition penalty, which
                is not the same on them.
            generated: the tokens between the prompt and this position.

        Returns:
            [v] fp32, all on one token at temperature 0.
        """
        params = self.params
        scores = logits.to(torch.float32)
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(generated, dtype=torch.int64, device=self._device)
            seen = torch.cat((self._prompt, seen))
            scores = penalize_repetition(scores, seen, params.repetition_penalty)
        scores = self._adjusted(scores, generated)
        if self._forbids(len(generated)):
            scores = scores.index_fill(0, self._forbidden, -torch.inf)
        if params.temperature == 0:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        # Less the largest first: a small temperature then overflows to -inf, never to inf.
        scores = (scores - scores.max()) / _fp32(params.temperature)
        scores = limit_to_min_p(scores, params.min_p)
        scores = limit_to_top_k(scores, params.top_k)
        top_p = params.top_p * params.top_p_decay ** len(generated)
        scores = limit_to_top_p(scores, max(top_p, params.top_p_bound))
        return scores.softmax(dim=-1)

    def uniform(self) -> float:
        """The next random number of the request, 0 <= u <= 1 - 2**-52."""
        return self._random.getrandbits(52) / 2**52

    def draw(self, probabilities: Tensor) -> int:
        """Draw a token from probabilities [v], with one random number."""
        # In fp64, and because u stays an ulp below 1, u times the sum is always below the sum: the
        # first place above it exists, and its token has a probability above 0.
        reached = probabilities.cumsum(dim=0, dtype=torch.float64)
        return int(torch.searchsorted(reached, self.uniform() * reached[-1], right=True))

    @staticmethod
    def residual(target: Tensor, draft: Tensor) -> Tensor:
        """Where to draw from after a drafted token was refused, [v] and [v] -> [v].

        If a token drawn from `draft` is kept with probability min(1, target / draft), and else
        replaced by a draw from this, the result is distributed as `target` (speculative sampling,
        arXiv 2211.17192). Where the two are equal nothing is refused, and this is `target`.
        """
        missing = (target - draft).clamp_(min=0)
        total = missing.sum()
        return torch.where(total > 0, missing / total, target)

    def _adjusted(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        """Scores [v] with the request's own bias, and less the penalties of what was generated."""
        params = self.params
        if params.logit_bias:
            scores = scores.index_add(0, *self._bias)
        if generated and (params.presence_penalty or params.frequency_penalty):
            seen = torch.tensor(generated, dtype=torch.int64, device=self._device)
            tokens, counts = seen.unique(return_counts=True)
            penalties = params.presence_penalty + params.frequency_penalty * counts
            scores = scores.index_add(0, tokens, -penalties.to(scores.dtype))
        return scores

    def _forbids(self, num_generated: int) -> bool:
        return num_generated < self.params.min_tokens and self._forbidden.numel() > 0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of the tokens `seen` by a penalty, multiply negative ones, [v] -> [v].

    As often as a token may be in `seen`, it is penalized once (CTRL, arXiv 1909.05858).
    """
    chosen = logits[seen]
    penalty = _fp32(penalty)
    return logits.scatter(0, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def limit_to_min_p(logits: Tensor, p: float) -> Tensor:
    """Rule out tokens with less than p times the largest probability, [v] -> [v].

    Min-p sampling, arXiv 2407.01082.
    """
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(p), -torch.inf)


def limit_to_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k most probable tokens (and what ties with the last), [v] -> [v]."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[-1]
    return logits.masked_fill(logits < least, -torch.inf)


def limit_to_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the fewest most probable tokens whose probabilities reach p, [v] -> [v].

    At least the most probable one is left. Nucleus sampling, arXiv 1904.09751.
    """
    if p == 1.0:
        return logits
    probabilities = logits.softmax(dim=-1)
    size = len(logits)
    for count in (*(count for count in _NUCLEI if count < size), size):
        best, order = probabilities.topk(count)
        before = best.cumsum(dim=0, dtype=torch.float64) - best
        if count == size or before[-1] >= p:
            break
    kept = before < p
    kept[0] = True
    values = logits[order].where(kept, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(0, order, values)


def _fp32(factor: float) -> float:
    """A positive factor for logits, within what fp32 can multiply and divide them by."""
    return min(max(factor, 1e-30), 1e30)
