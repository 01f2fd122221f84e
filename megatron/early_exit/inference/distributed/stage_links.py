"""The way of hidden states from each stage of a pipeline to the next one.

A send is over only when its receiver has posted the receive, and until then it stops whatever waits
for it: NCCL's first transfer between two ranks stops the processes themselves, because it builds
their communicator, and later ones stop every synchronisation of the whole device (an allocator that
gives memory back, a graph that is captured). So that no process can wait for ever:

- neighbours exchange a row before anything else, in an order that ends although it blocks;
- a stage is told of hidden states before they are sent, and posts the receive as soon as it hears
  of them, whenever it computes with them (see `PipelineStage.run` and `PipelineWorker`).

Hidden states only go forward, so then what a send waits for never waits for the sender.
"""

from collections import deque

import torch
from torch import Tensor, distributed

from megatron.early_exit.inference.distributed.process_groups import RankInfo

MAX_SENDS = 64
"""Sends that are kept at a time. Gloo does not tell that one is over until it is waited for."""


class StageLinks:
    """What a rank receives from the stage before and sends to the next one, each in its order.

    All ranks of a pipeline must create it together.

    Args:
        rank_info: of this process.
        hidden_size: h.
        dtype: of hidden states.
        device: where they are.
    """

    def __init__(
        self, rank_info: RankInfo, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        even = odd = rank_info.group
        if rank_info.num_stages > 2:
            # What a rank receives does not queue up behind what it sends, also where a process
            # group has a single communicator with a single stream for all transfers of a rank
            # (NCCL with the `device_id` of `init_process_group`).
            group = distributed.new_group(list(range(rank_info.num_ranks)))
            assert isinstance(group, distributed.ProcessGroup)
            odd = group
        is_even = rank_info.stage % 2 == 0
        self._behind, self._before = (even, odd) if is_even else (odd, even)
        self._source = None if rank_info.is_first_stage else rank_info.rank - rank_info.stage_size
        self._target = None if rank_info.is_last_stage else rank_info.rank + rank_info.stage_size
        self._sends: deque[tuple[distributed.Work, Tensor]] = deque()
        self._receives: deque[tuple[distributed.Work, Tensor]] = deque()
        self._connect(is_even)

    def _connect(self, is_even: bool) -> None:
        # First all even stages with the next ones, then all odd ones: at a time a rank has to do
        # with one other only, which has to do with it.
        for behind in (is_even, not is_even):
            if behind and self._target is not None:
                self.send(torch.zeros(1, self._hidden_size, dtype=self._dtype, device=self._device))
                self.finish()
            elif not behind and self._source is not None:
                self.expect(1)
                self.take()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def expect(self, num_rows: int) -> None:
        """Post the receive of hidden states [num_rows, h] from the stage before."""
        assert self._source is not None
        shape = (num_rows, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        received = distributed.irecv(hidden, self._source, group=self._before)
        assert received is not None
        self._receives.append((received, hidden))

    def take(self) -> Tensor:
        """The first hidden states that were expected and not taken, waited for: [num_rows, h] as
        in the call of `expect`."""
        received, hidden = self._receives.popleft()
        received.wait()
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Send hidden states [num_rows, h], which must not change, to the next stage, which has to
        know of them already."""
        assert self._target is not None
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        while len(self._sends) >= MAX_SENDS:
            self._sends.popleft()[0].wait()
        sent = distributed.isend(hidden, self._target, group=self._behind)
        assert sent is not None
        self._sends.append((sent, hidden))

    def finish(self) -> None:
        """Wait until the next stage has got everything, and the device has done everything."""
        while self._sends:
            self._sends.popleft()[0].wait()
        if self._device.type == "cuda":
            # Waiting for a transfer of NCCL's only stops the stream.
            torch.cuda.current_stream(self._device).synchronize()
