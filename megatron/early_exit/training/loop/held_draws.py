"""Draws which tokens the layers hand on in each microbatch.

Every draw is a function of the seed, the iteration and the number of the sequence in the global
batch. So all ranks that work on a sequence draw the same for it without a word between them, in
every layout, and a run that goes on from a checkpoint draws what an uninterrupted one does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.model.held_rows import HeldRows
from megatron.early_exit.model.rng import derived_seed
from megatron.early_exit.training.loop.holding_options import HoldingOptions

# What sequences draw separately: which layers they skip, and which of their tokens leave.
_LAYERS, _TOKENS = 1, 2


def dropout_probabilities(
    options: HoldingOptions, num_layers: int, iteration: int, iterations: int
) -> list[float]:
    """Probability of each layer to be skipped, p(l, t) = S(t) D(l) p_max (LayerSkip, arXiv
    2404.16710).

    Args:
        options: p_max and the schedule.
        num_layers: of the model, L.
        iteration: completed iterations, t from 0.
        iterations: of the whole run, T.
    """
    scale = options.layer_dropout
    if options.layer_dropout_schedule == "exponential":
        scale *= _from_zero_to_one(iteration, iterations)
    return [scale * _from_zero_to_one(layer, num_layers) for layer in range(num_layers)]


def _from_zero_to_one(index: int, count: int) -> float:
    """exp(index ln 2 / (count - 1)) - 1."""
    return 2.0 ** (min(index, count - 1) / max(count - 1, 1)) - 1.0


@dataclass(frozen=True, kw_only=True)
class HeldDraws:
    """Draws for the microbatches of this rank.

    Attributes:
        options: what is held.
        num_layers: of the whole model.
        positions: the exits behind which tokens can be frozen.
        seed: of all draws.
        iterations: tells how many iterations the run has.
        micro_batch_size: sequences in a microbatch.
        seq_length: tokens in a sequence.
        data_parallel_rank, data_parallel_size: which replica of the model this is, of how many.
    """

    options: HoldingOptions
    num_layers: int
    positions: tuple[int, ...]
    seed: int
    iterations: Callable[[], int]
    micro_batch_size: int
    seq_length: int
    data_parallel_rank: int
    data_parallel_size: int

    def draw(self, iteration: int, microbatch: int) -> HeldRows:
        """What is held in a microbatch.

        Args:
            iteration: completed iterations.
            microbatch: its number in the step, from 0, in the order in which data are read.
        """
        replica = microbatch * self.data_parallel_size + self.data_parallel_rank
        first = replica * self.micro_batch_size
        samples = range(first, first + self.micro_batch_size)
        return HeldRows(
            frozen_at=torch.stack([self._frozen_at(iteration, sample) for sample in samples]),
            skipped=torch.stack([self._skipped(iteration, sample) for sample in samples]),
        )

    def _skipped(self, iteration: int, sample: int) -> Tensor:
        """The layers that a sequence skips, [number of layers]."""
        chances = dropout_probabilities(self.options, self.num_layers, iteration, self.iterations())
        generator = self._generator(iteration, sample, _LAYERS)
        draws = torch.rand(self.num_layers, generator=generator, dtype=torch.float64)
        return draws < torch.tensor(chances, dtype=torch.float64)

    def _frozen_at(self, iteration: int, sample: int) -> Tensor:
        """The exit behind which each token of a sequence is frozen, else the number of layers."""
        stays = torch.full((self.seq_length,), self.num_layers)
        chance = self.options.exit_propagate_prob
        if not chance:
            return stays
        generator = self._generator(iteration, sample, _TOKENS)
        leaves = torch.rand(self.seq_length, generator=generator) < chance
        which = torch.randint(len(self.positions), (self.seq_length,), generator=generator)
        return torch.where(leaves, torch.tensor(self.positions)[which], stays)

    def _generator(self, iteration: int, sample: int, purpose: int) -> torch.Generator:
        seed = derived_seed(self.seed, iteration, sample, purpose)
        return torch.Generator("cpu").manual_seed(seed)
