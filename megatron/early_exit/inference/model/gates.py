"""The gates of exits, which say whether to leave before an exit is evaluated."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.transfer import upload


class Gates:
    """The gates of all exits of a model: linear classifiers of the residual stream at unit RMS, as
    in `megatron.early_exit.model.exit_gate`.

    Shapes: e exits, h hidden size, n rows.

    Args:
        weights: [e, h], one row for each exit.
        biases: [e].
        epsilon: added to the mean square of the residual stream.
    """

    def __init__(self, weights: Tensor, biases: Tensor, epsilon: float) -> None:
        self._weights, self._biases = weights.to(torch.float32), biases.to(torch.float32)
        self._epsilon = epsilon

    @classmethod
    def of(
        cls, early_exit: EarlyExitConfig, weights: Mapping[str, Tensor], epsilon: float
    ) -> "Gates | None":
        """Those of a model with some weights; None where its exits have none.

        Args:
            early_exit: the exits.
            weights: tensors by name; the gate of an exit has `exits.{position}.gate.weight` [1, h]
                and `exits.{position}.gate.bias` [1].
            epsilon: added to the mean square of the residual stream.
        """
        if not (early_exit.use_exit_gate and early_exit.positions):
            return None
        prefixes = [f"exits.{position}.gate." for position in early_exit.positions]
        rows, biases = (
            torch.cat([weights[f"{prefix}{name}"] for prefix in prefixes])
            for name in ("weight", "bias")
        )
        return cls(rows, biases, epsilon)

    def confidences(self, exits: Sequence[int], streams: Tensor) -> Tensor:
        """How sure gates are.

        A row's result does not depend on the other rows, so that a sequence gets the same tokens
        in whatever company.

        Args:
            exits: for each row the index of its exit.
            streams: [n, h], the residual stream there.

        Returns:
            [n] in fp32, 0 to 1.
        """
        streams = streams.to(torch.float32)
        weights, biases = self._weights[exits[0]], self._biases[exits[0]]
        if any(one != exits[0] for one in exits):
            index = upload(exits, streams.device)
            weights, biases = self._weights[index], self._biases[index]
        size = streams.square().mean(dim=-1).add_(self._epsilon).rsqrt_()
        return (streams * weights).sum(dim=-1).mul_(size).add_(biases).sigmoid_()
