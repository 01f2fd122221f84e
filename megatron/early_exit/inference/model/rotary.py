"""Rotary position embeddings (arXiv 2104.09864), all variants brought into one layout.

Which entries of a head turn together differs: neighbours (interleaved), or entry i of the first
half of the rotated part with entry i of the second; and only a part may turn. Attention depends
only on products of queries and keys, so both may be permuted alike. Here the rows of the query
and key projections are permuted once, such that the entries that turn together are neighbours, and
entries that stay turn by an angle of zero: a head is a row of complex numbers, and turning it is
one product.
"""

import math

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture

_LLAMA3_ORIGINAL_CONTEXT = 8192
_LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
_LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0


class RotaryTable:
    """How far the entries turn at every position.

    Attributes:
        order: [hn], which entry of a stored head comes where.
        turns: [positions, 1, hn / 2], complex numbers of length 1.
        real_turns: [positions, 1, hn / 2, 2], the same numbers' real and imaginary parts.

    Raises:
        ValueError: an odd number of entries would turn.
    """

    def __init__(self, architecture: Architecture, device: torch.device):
        head_size = architecture.kv_channels
        turned = int(head_size * architecture.rotary_percent)
        if turned % 2 or head_size % 2:
            raise ValueError(
                f"rotary_percent {architecture.rotary_percent} turns {turned} entries of heads of "
                f"{head_size}, allowed: even numbers"
            )
        entries = torch.arange(turned)
        if not architecture.rotary_interleaved:
            entries = entries.unflatten(0, (2, -1)).t().flatten()
        self.order = torch.cat((entries, torch.arange(turned, head_size))).to(device)
        angles = torch.zeros(architecture.max_position_embeddings, 1, head_size // 2)
        angles[:, 0, : turned // 2] = _angles(architecture, turned)
        self.turns = torch.polar(torch.ones_like(angles), angles).to(device)
        self.real_turns = torch.view_as_real(self.turns)


def _angles(architecture: Architecture, turned: int) -> Tensor:
    """[positions, turned / 2], in radians."""
    exponents = torch.arange(0, turned, 2, dtype=torch.float32) / turned
    frequencies = 1.0 / architecture.rotary_base**exponents
    if architecture.rope_scaling_factor is not None:
        frequencies = _llama3_scaled(frequencies, architecture.rope_scaling_factor)
    positions = torch.arange(architecture.max_position_embeddings, dtype=torch.float32)
    if architecture.rotary_seq_len_interpolation_factor is not None:
        positions = positions / architecture.rotary_seq_len_interpolation_factor
    return torch.outer(positions, frequencies)


def _llama3_scaled(frequencies: Tensor, factor: float) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a smooth step in between (Llama 3.1,
    arXiv 2407.21783)."""
    low, high = _LLAMA3_LOW_FREQUENCY_FACTOR, _LLAMA3_HIGH_FREQUENCY_FACTOR
    turns = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / factor)
