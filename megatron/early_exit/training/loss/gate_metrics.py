"""How well gates are calibrated: sums over microbatches, and figures over all ranks."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

_BINS = 128
"""Of the confidence; half of them are below 0.5, so that the accuracy is exact."""


class GateMetrics:
    """Sums over tokens: each gate's loss, and histograms of its confidence, one of the tokens at
    which the exit agrees with the final head and one of the others.

    Args:
        positions: the positions of all exits of the model, on every rank the same.
    """

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.positions = positions
        self._losses: Tensor | None = None
        self._counts: Tensor | None = None
        self._last: dict[str, Tensor] = {}

    def add(
        self, position: int, confidence: Tensor, loss: Tensor, agrees: Tensor, mask: Tensor
    ) -> None:
        """Add one microbatch.

        Args:
            position: of the exit.
            confidence: [n], the gate's, 0 to 1.
            loss: [n], its cross entropy.
            agrees: [n], 1 where the exit's most probable token is the final head's, else 0.
            mask: [n], which tokens count.
        """
        losses, counts = self._sums(mask.device)
        row = self.positions.index(position)
        losses[row] += torch.dot(loss, mask)
        bins = (confidence * _BINS).long().clamp_(0, _BINS - 1) + agrees.long() * _BINS
        counts[row].view(-1).index_add_(0, bins, mask.double())

    def take(
        self,
        groups: ProcessGroupCollection,
        device: torch.device,
        but: frozenset[int] = frozenset(),
    ) -> dict[str, Tensor]:
        """The figures of each gate since the last call, 0-dimensional: its mean loss per token; the
        share of tokens at which it is right, where 0.5 is yes; and the area under its ROC curve
        (AUC), which is the probability that it is surer of a token at which the exit agrees than of
        one at which it does not (a draw within a bin counts half), and 0.5 if there are only tokens
        of one kind. A gate that has not been measured since then has the figures that it had.

        A collective call over the data-parallel, context-parallel and pipeline groups.

        Args:
            groups: those.
            device: of the figures.
            but: positions to leave out, on every rank the same.
        """
        losses, counts = self._sums(device)
        self._losses = self._counts = None
        for group in (groups.dp_cp, groups.pp):
            torch.distributed.all_reduce(losses, group=group)
            torch.distributed.all_reduce(counts, group=group)
        figures: dict[str, Tensor] = {}
        for row, position in enumerate(self.positions):
            others, agreeing = counts[row]
            tokens = counts[row].sum().clamp(min=1)
            half = _BINS // 2
            right = others[:half].sum() + agreeing[half:].sum()
            below = others.cumsum(0) - others / 2
            pairs = others.sum() * agreeing.sum()
            auc = torch.dot(agreeing, below) / pairs.clamp(min=1)
            found = {
                "loss": losses[row] / tokens,
                "accuracy": right / tokens,
                "AUC": torch.where(pairs > 0, auc, 0.5),
            }
            for name, value in found.items():
                key = f"exit {position} gate {name}"
                last = self._last.get(key, value)
                figures[key] = torch.where(counts[row].sum() > 0, value, last).float()
        self._last = figures
        left_out = tuple(f"exit {position} gate " for position in but)
        return {name: value for name, value in figures.items() if not name.startswith(left_out)}

    def _sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._losses is None or self._counts is None:
            size, kind = len(self.positions), {"dtype": torch.float64, "device": device}
            self._losses = torch.zeros(size, **kind)  # type: ignore[call-overload]
            self._counts = torch.zeros(size, 2, _BINS, **kind)  # type: ignore[call-overload]
        return self._losses, self._counts
