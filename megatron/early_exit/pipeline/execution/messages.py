"""The messages of a rank, over Megatron's `P2PCommunicator`."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron.early_exit.pipeline.actions import Action, Microbatch

Outgoing = dict[Microbatch, Tensor]


def together(actions: Sequence[Action]) -> Iterator[list[Action]]:
    """Divide a list into computations, each alone, and neighbouring messages that are exchanged at
    once: one at most in each direction with each neighbour."""
    for is_communication, group in groupby(actions, lambda action: action.is_communication):
        batch: list[Action] = []
        for action in group:
            if batch and (not is_communication or action.kind in {one.kind for one in batch}):
                yield batch
                batch = []
            batch.append(action)
        yield batch


class Messages:
    """What a rank has received and not yet used.

    Args:
        communicator: of the pipeline.
        shape: [s, b, h] of every message.
    """

    def __init__(self, communicator: P2PCommunicator, shape: Sequence[int]) -> None:
        self._communicator = communicator
        self._shape = list(shape)
        self.hidden: Outgoing = {}
        self.gradients: Outgoing = {}

    def exchange(self, batch: Sequence[Action], hidden: Outgoing, gradients: Outgoing) -> None:
        """Send and receive at once, and wait for all of it.

        Args:
            batch: the messages, see `together`.
            hidden: results of forwards; what is sent is taken out.
            gradients: results of backwards; what is sent is taken out.
        """
        by_kind = {action.kind: action.microbatch for action in batch}
        # Megatron's annotations leave out that each part may be absent.
        received = self._communicator.send_forward_backward_recv_forward_backward(
            hidden.pop(by_kind["SF"]) if "SF" in by_kind else None,  # type: ignore[arg-type]
            gradients.pop(by_kind["SB"]) if "SB" in by_kind else None,  # type: ignore[arg-type]
            recv_prev="RF" in by_kind,
            recv_next="RB" in by_kind,
            tensor_shape=self._shape,
        )
        for kind, tensor, kept in zip(
            ("RF", "RB"), received, (self.hidden, self.gradients), strict=True
        ):
            if kind in by_kind:
                kept[by_kind[kind]] = tensor
