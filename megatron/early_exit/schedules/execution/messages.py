"""The messages of a rank, over Megatron's `P2PCommunicator`, beside its computations.

Nothing is waited for before it is needed: a send ends when the receiver has got round to it, and a
receive when its computation begins. So a rank does not stop because its neighbour is busy with a
microbatch that fills a bubble. Messages of one direction between two ranks are posted in the same
order on both, which is what matches them.

With NCCL the first message between two ranks stops both until they have built a communicator, and
messages of both directions may share one, so that they end in the order of their posts. Neither can
stop the ranks for ever, nor can a rank that waits for its whole device: all ranks post their
messages in one order (see `communication`), so the first that has not ended waits for nothing.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron.early_exit.schedules.actions import Action, Kind, Microbatch

Key = tuple[Kind, Microbatch]


@dataclass
class _Message:
    """A tensor on its way.

    Attributes:
        tensor: what is sent or received.
        work: tells when it has been.
        when_sent: called then, for a send.
    """

    tensor: Tensor
    work: Work
    when_sent: Callable[[Tensor], None] | None = None


class Messages:
    """Posts the sends and receives of a rank's list, and keeps what is on its way.

    Args:
        group: of the pipeline.
        config: Megatron's.
        shape: [s, b, h] of every message.
    """

    def __init__(self, group: ProcessGroup, config: Any, shape: Sequence[int]) -> None:
        # Megatron's batched messages can only be waited for at once.
        unbatched = copy.copy(config)
        unbatched.batch_p2p_comm = False
        self._communicator = P2PCommunicator(pp_group=group, config=unbatched)
        self._shape = list(shape)
        self._messages: dict[Key, _Message] = {}

    def send(self, action: Action, tensor: Tensor, when_sent: Callable[[Tensor], None]) -> None:
        """Post a send.

        Args:
            action: a send.
            tensor: [s, b, h] that is sent.
            when_sent: called with the tensor once it has been, some time later.
        """
        self._end_sends()
        post, end = self._ways(action.kind)
        _, works = post(tensor, False, self._shape, overlap_p2p_comm=True)
        self._messages[action.kind, action.microbatch] = _Message(tensor, works[end], when_sent)

    def receive(self, action: Action) -> None:
        """Post a receive."""
        self._end_sends()
        post, end = self._ways(action.kind)
        tensor, works = post(None, True, self._shape, overlap_p2p_comm=True)
        self._messages[action.kind, action.microbatch] = _Message(tensor, works[end])

    def _ways(self, kind: Kind) -> tuple[Callable[..., Any], str]:
        """Megatron's method for a kind of message, and its name for this end of it."""
        return {
            "SF": (self._communicator.send_forward_recv_forward, "send_next"),
            "RF": (self._communicator.send_forward_recv_forward, "recv_prev"),
            "SB": (self._communicator.send_backward_recv_backward, "send_prev"),
            "RB": (self._communicator.send_backward_recv_backward, "recv_next"),
        }[kind]

    def take(self, kind: Kind, microbatch: Microbatch) -> Tensor | None:
        """What has been received [s, b, h], waited for; None where no receive was posted."""
        message = self._messages.pop((kind, microbatch), None)
        if message is None:
            return None
        message.work.wait()
        return message.tensor

    def end_send(self, kind: Kind, microbatch: Microbatch) -> None:
        """Wait for a send, if it is still on its way."""
        message = self._messages.pop((kind, microbatch), None)
        if message is not None:
            message.work.wait()
            assert message.when_sent is not None
            message.when_sent(message.tensor)

    def end_all_sends(self) -> None:
        """Wait for all that is still on its way."""
        for kind, microbatch in list(self._messages):
            self.end_send(kind, microbatch)

    def _end_sends(self) -> None:
        for (kind, microbatch), message in list(self._messages.items()):
            if message.when_sent is not None and message.work.is_completed():
                self.end_send(kind, microbatch)
