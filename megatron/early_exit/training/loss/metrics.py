"""Running sums of what exits and other heads measured, and their means over all ranks."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.early_exit.training.loss.gate_metrics import GateMetrics
from megatron.early_exit.training.loss.head_loss import HeadLoss

_LOSS, _CORRECT, _TOKENS = range(3)


class ExitMetrics:
    """Sums over tokens of each exit's loss and correct predictions.

    Args:
        positions: the positions of all exits of the model, on every rank the same.
        has_gates: whether they have gates.
        name: what the heads are called in the log, before their positions.

    Attributes:
        gates: the measurements of these; None where there are none.
    """

    def __init__(
        self, positions: tuple[int, ...], has_gates: bool = False, name: str = "exit"
    ) -> None:
        self.positions = positions
        self.name = name
        self.gates = GateMetrics(positions) if has_gates else None
        self._sums: Tensor | None = None
        self._last: Tensor | None = None

    def add(self, position: int, result: HeadLoss, mask: Tensor) -> None:
        """Add one microbatch; `mask` [n] tells which tokens count."""
        if self._sums is None:
            self._sums = self._zeros(mask.device)
        row = self._sums[self.positions.index(position)]
        row[_LOSS] += torch.dot(result.loss, mask)
        row[_CORRECT] += torch.dot(result.correct, mask)
        row[_TOKENS] += mask.sum()

    def take_means(
        self,
        groups: ProcessGroupCollection,
        device: torch.device,
        but: frozenset[int] = frozenset(),
    ) -> dict[str, Tensor]:
        """Mean loss and accuracy per token of each exit since the last call, 0-dimensional. An exit
        that has not been measured since then has the means that it had.

        A collective call over the data-parallel, context-parallel and pipeline groups.

        Args:
            groups: those.
            device: of the means.
            but: positions to leave out, on every rank the same.

        Returns:
            `exit N loss` and `exit N accuracy` for each position N, or with another name, the same
            on every rank; and what `GateMetrics` has.
        """
        sums = self._zeros(device) if self._sums is None else self._sums
        self._sums = None
        torch.distributed.all_reduce(sums, group=groups.dp_cp)
        torch.distributed.all_reduce(sums, group=groups.pp)
        found = sums[:, :_TOKENS] / sums[:, _TOKENS:].clamp(min=1)
        if self._last is not None:
            found = torch.where(sums[:, _TOKENS:] > 0, found, self._last)
        self._last = found
        means: dict[str, Tensor] = {}
        for row, position in enumerate(self.positions):
            if position in but:
                continue
            means[f"{self.name} {position} loss"] = found[row, _LOSS].float()
            means[f"{self.name} {position} accuracy"] = found[row, _CORRECT].float()
        if self.gates is not None:
            means |= self.gates.take(groups, device, but)
        return means

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self.positions), 3, dtype=torch.float64, device=device)
