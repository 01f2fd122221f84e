"""Draws the tokens of many positions at once, each as its own request asks for it.

The order is vLLM's (`vllm/v1/sample/sampler.py`): repetition penalty, bias and OpenAI's penalties,
forbidden tokens, temperature, then min-p, top-k and top-p, each on what the one before leaves.
Hugging Face's `transformers` has min-p last, all else that it has is the same.

A row's token depends on nothing but its logits and its request. Shapes: n rows, v tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.modes.adjustments import adjusted
from megatron.early_exit.inference.modes.draw import Draw, Drawn
from megatron.early_exit.inference.modes.limits import (
    limit_to_min_p,
    limit_to_top_k,
    limit_to_top_p,
)
from megatron.early_exit.inference.modes.rows import column, fp32_factor, replaced, some_rows

_NUCLEI = (512, 16384)
"""How many tokens to order for top-p before the whole vocabulary is. Most nuclei are smaller than
the first, and ordering so few of 128k takes a thirtieth of the time."""
_HOST_NUMBERS = 2**17
"""Logits that a CPU's cache holds together with what is computed of them."""


def draw(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[Drawn]:
    """Draw some tokens, at least one, and wait for them.

    Args:
        rows: the logits [v] of each position, fp32.
        draws: for each.
    """
    count = len(rows)
    if rows[0].device.type == "cpu":
        count = max(_HOST_NUMBERS // len(rows[0]), 1)
    drawn: list[Drawn] = []
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        logits = part[0].unsqueeze(0) if len(part) == 1 else torch.stack(list(part))
        batch = DrawBatch(logits, draws[start : start + count])
        drawn += batch.read(batch.figures.tolist())
    return drawn


class DrawBatch:
    """Draws whose tokens are still on the device.

    Args:
        logits: [n, v] fp32, as the heads have given them. They need not be finite; then no token
            comes of it, or any.
        draws: for each row.
        orders_all: top-p is to order the whole vocabulary at once.

    Attributes:
        figures: [n, 1] int64 or [n, 2] fp32, what `read` needs: tokens, v where there is none, and
            from an accelerator their logits. fp32 holds every integer up to 2**24 exactly, more
            than any vocabulary.
    """

    def __init__(self, logits: Tensor, draws: Sequence[Draw], orders_all: bool = False) -> None:
        self._logits, self._draws = logits, draws
        # To read something there is to wait for nothing.
        self._is_on_host = logits.device.type == "cpu"
        self._orders_all = orders_all or self._is_on_host
        self._probabilities: dict[int, Tensor] = {}
        scores = adjusted(logits, draws)
        rows = [row for row, one in enumerate(draws) if one.sampler.params.temperature > 0]
        if len(rows) == len(draws):
            tokens = self._sampled(scores, rows)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
            if rows:
                part, index = some_rows(scores, rows)
                tokens = replaced(tokens, index, self._sampled(part, rows))
        self.figures = tokens
        if not self._is_on_host:
            chosen = logits.gather(1, tokens.clamp(max=logits.shape[-1] - 1))
            self.figures = torch.cat((tokens.to(torch.float32), chosen), dim=1)

    def read(self, figures: Sequence[Sequence[float]]) -> list[Drawn]:
        """The tokens, from the numbers of `figures` on the host.

        A row whose nucleus has turned out to be large is drawn once more, with the same random
        numbers.
        """
        size, found = self._logits.shape[-1], []
        for row, (one, (token, *logit)) in enumerate(zip(self._draws, figures, strict=True)):
            chosen = logit[0] if logit else None
            found.append(Drawn(one, int(token), chosen, self._probabilities.get(row)))
        rows = [row for row, one in enumerate(found) if one.token == size]
        if rows and not self._orders_all:
            logits, _ = some_rows(self._logits, rows)
            again = DrawBatch(logits, [self._draws[row] for row in rows], orders_all=True)
            for row, drawn in zip(rows, again.read(again.figures.tolist()), strict=True):
                found[row] = drawn
        return found

    def _sampled(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens [n, 1] drawn from scores [n, v], which are of some rows."""
        draws = [self._draws[row] for row in rows]
        probabilities = self._limited(scores, draws).softmax(dim=-1)
        for place, (row, one) in enumerate(zip(rows, draws, strict=True)):
            if one.keeps:
                self._probabilities[row] = probabilities[place]
        verified = [place for place, one in enumerate(draws) if one.draft is not None]
        numbers = [one.sampler.number(one.number + (one.draft is not None)) for one in draws]
        if not verified:
            return _drawn(probabilities, numbers)
        part, index = some_rows(probabilities, verified)
        drafts, is_accepted, residual = compare_drafts(part, [draws[place] for place in verified])
        if self._is_on_host and index is None and is_accepted.all():
            return drafts
        tokens = _drawn(replaced(probabilities, index, residual), numbers)
        part, index = some_rows(tokens, verified)
        return replaced(tokens, index, drafts.where(is_accepted, part))

    def _limited(self, scores: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Scores [n, v] after temperature, min-p, top-k and top-p."""
        size, device = scores.shape[-1], scores.device
        # Less the largest first: a small temperature then overflows to -inf, never to inf.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        temperatures = [fp32_factor(one.sampler.params.temperature) for one in draws]
        if len(temperatures) == 1 and self._is_on_host:
            scores.div_(temperatures[0])
        else:
            scores.div_(column(temperatures, device))
        if not any(one.sampler.is_limited for one in draws):
            return scores
        params = [one.sampler.params for one in draws]
        if places := [place for place, one in enumerate(params) if one.min_p > 0]:
            part, index = some_rows(scores, places)
            log_p = column([math.log(params[place].min_p) for place in places], device)
            scores = replaced(scores, index, limit_to_min_p(part, log_p))
        if places := [place for place, one in enumerate(params) if 0 < one.top_k < size]:
            part, index = some_rows(scores, places)
            k = [params[place].top_k for place in places]
            part = limit_to_top_k(part, column(k, device, torch.int64), max(k))
            scores = replaced(scores, index, part)
        top_p = [one.sampler.top_p(one.position) for one in draws]
        if places := [place for place, p in enumerate(top_p) if p != 1.0]:
            part, index = some_rows(scores, places)
            p = column([top_p[place] for place in places], device, torch.float64)
            scores = replaced(scores, index, limit_to_top_p(part, p, self._nuclei(size)))
        return scores

    def _nuclei(self, size: int) -> Sequence[int]:
        """How many tokens of a vocabulary top-p is to order. Elsewhere than on the host, to learn
        whether that is enough means to wait, so it is learnt together with the tokens."""
        counts = [*(count for count in _NUCLEI if count < size), size]
        if self._is_on_host:
            return counts
        return counts[-1:] if self._orders_all else counts[:1]


def _drawn(probabilities: Tensor, numbers: Sequence[float]) -> Tensor:
    """Tokens [n, 1] drawn from probabilities [n, v], which need not be normalized; v where they are
    NaN."""
    # In fp64, and because u stays an ulp below 1, u times the sum is always below the sum: the
    # first place above it exists, and its token has a probability above 0.
    reached = probabilities.cumsum(dim=-1, dtype=torch.float64)
    aims = column(numbers, reached.device, torch.float64) * reached[:, -1:]
    return torch.searchsorted(reached, aims, right=True)


def compare_drafts(target: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """Compare drafts with probabilities [n, v].

    Returns:
        The drafts [n, 1]; whether each is accepted [n, 1]; and what to draw from where it is not
        [n, v].
    """
    device, drafts = target.device, [one.draft for one in draws if one.draft is not None]
    tokens = column([one.token for one in drafts], device, torch.int64)
    given = [one.probabilities for one in drafts if one.probabilities is not None]
    draft = given[0].unsqueeze(0) if len(given) == 1 else torch.stack(given)
    numbers = [one.sampler.number(one.number) for one in draws]
    shares = column(numbers, device, torch.float64) * draft.gather(1, tokens)
    missing = (target - draft).clamp_(min=0)
    # Where the two are equal nothing is refused, but for what rounding makes of them.
    is_any = missing.amax(dim=-1, keepdim=True) > 0
    return tokens, shares < target.gather(1, tokens), missing.where(is_any, target)
