"""What requests change in logits before they are sampled from: penalties, bias, forbidden tokens.

Each request has its own tokens, so the batch [n, v] is treated as one row of n * v logits.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.modes.draw import Draw
from megatron.early_exit.inference.modes.rows import fp32_factor
from megatron.early_exit.inference.transfer import upload


def adjusted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits [n, v] with penalties and bias, and without forbidden tokens; they themselves
    where no row has any."""
    if not any(one.sampler.is_adjusted for one in draws):
        return logits
    size, device = logits.shape[-1], logits.device
    seen, counts, lengths = array("q"), array("f"), [0] * len(draws)
    biased, biases, forbidden = array("q"), array("f"), array("q")
    for row, one in enumerate(draws):
        sampler, start = one.sampler, row * size
        if sampler.counts is not None:
            tokens, often = sampler.counts.of(one.generated, one.behind)
            lengths[row] = len(tokens)
            seen.extend(tokens)
            counts.extend(often)
        for token, bias in sampler.params.logit_bias:
            biased.append(start + token)
            biases.append(bias)
        forbidden.extend([start + token for token in sampler.forbidden(one.position)])
    if not (seen or biased or forbidden):
        return logits
    flat = logits.clone(memory_format=torch.contiguous_format).view(-1)
    factors = penalties = None
    if seen:
        starts = torch.arange(0, flat.numel(), size).repeat_interleave(torch.tensor(lengths))
        places = upload(_tensor(seen).add_(starts), device)
        factors, penalties = _penalties(draws, lengths, _tensor(counts))
    if factors is not None:
        factors, chosen = upload(factors, device), flat[places]
        flat.scatter_(0, places, torch.where(chosen < 0, chosen * factors, chosen / factors))
    if biased:
        flat.index_add_(0, upload(_tensor(biased), device), upload(_tensor(biases), device))
    if penalties is not None:
        flat.index_add_(0, places, upload(penalties, device))
    if forbidden:
        flat.index_fill_(0, upload(_tensor(forbidden), device), -torch.inf)
    return flat.view_as(logits)


def _penalties(
    draws: Sequence[Draw], lengths: Sequence[int], counts: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """For each token that a row has seen, on the host, the repetition penalty: positive logits are
    divided by it, negative ones multiplied (CTRL, arXiv 1909.05858); and what is added for OpenAI's
    penalties. None where no row has such a penalty.

    Args:
        draws: for each row.
        lengths: tokens that each row has seen.
        counts: how often each of those was generated.
    """
    params, repeats = [one.sampler.params for one in draws], torch.tensor(lengths)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(repeats)

    factors = penalties = None
    if any(one.repetition_penalty != 1.0 for one in params):
        factors = spread([fp32_factor(one.repetition_penalty) for one in params])
    if any(one.presence_penalty or one.frequency_penalty for one in params):
        penalties = spread([one.frequency_penalty for one in params]).mul_(counts)
        penalties += spread([one.presence_penalty for one in params])
        # Tokens of the prompt have not been generated.
        penalties = penalties.neg_().masked_fill_(counts == 0, 0.0)
    return factors, penalties


def _tensor(values: array[int] | array[float]) -> Tensor:
    dtype = torch.int64 if values.typecode == "q" else torch.float32
    return torch.frombuffer(bytearray(values.tobytes()), dtype=dtype)
