"""The final head's tokens on the stages before it, where gates learn from them.

Megatron's schedules carry hidden states and gradients between stages, nothing else. When the
gradient of a microbatch reaches a stage, the last one has long been through with its forward: then
the final head's tokens, 4 bytes each, are on their way here, and the gate learns in the backward
phase as its exit does. They come straight from the last stage, in groups of two ranks that nothing
else uses, so that they cannot be mistaken for a message of a schedule or wait for one. Each chunk
of a model sees the microbatches in the order of the last stage's forwards, both in the plain and in
the interleaved schedule, so they need no names. Where bubbles are filled, a stage gets the tokens
of those microbatches that run backward on it.

Tokens travel in the host's memory, by gloo also where the schedules use NCCL. A send of NCCL's ends
when it is received, which may be many microbatches later, and all that waits for the whole device
until then would wait for it: timers, memory that is given back, synchronized messages. The stage
that has to receive might wait for just that. The price is that the last stage's host waits for the
end of a forward before it goes on.

Passes without backward have them too late, by as many forwards as there are stages behind: what
waits for tokens in an evaluation is kept for `delay` more microbatches.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class FinalTokens:
    """The tokens of the microbatches that are under way, on one rank.

    Args:
        positions: of this rank's exits that are not on the chunk with the final head.
        sender: the rank of the last stage.
        group: of this rank and that one, where tokens come from there; None on the last stage.
        receivers: on the last stage, its groups with the stages that want tokens.
        delay: see the attribute.

    Attributes:
        delay: number of microbatches after which, in passes without backward, a microbatch's tokens
            come without waiting for this rank: a chunk that has begun so many more may take them.
    """

    def __init__(
        self,
        positions: Collection[int],
        sender: int,
        group: ProcessGroup | None = None,
        receivers: Mapping[int, ProcessGroup] = MappingProxyType({}),
        delay: int = 0,
    ) -> None:
        self.delay = delay
        self._sender, self._group, self._receivers = sender, group, receivers
        self._sent: list[tuple[Tensor, list[Work]]] = []
        self._spare: list[Tensor] = []
        """Messages that have arrived. They are used again, since the threads that send may hold one
        for a moment longer, and would be the ones to free it."""
        self._tokens: deque[Tensor] = deque()
        self._first = 0
        """The number of the microbatch that the first of these is of."""
        self._taken = dict.fromkeys(positions, 0)

    @classmethod
    def of(cls, chunks: Sequence[Any], pp_group: ProcessGroup) -> "FinalTokens":
        """Connect the stages of all pipelines; a collective call over all ranks.

        Args:
            chunks: this rank's, `EarlyExitGPTModel`s.
            pp_group: of its pipeline.
        """
        positions = [p for chunk in chunks if not chunk.post_process for p in chunk.exits.heads]
        own = tuple(torch.distributed.get_process_group_ranks(pp_group))
        wants = torch.distributed.get_rank() if positions and pp_group.rank() + 1 < len(own) else -1
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, (own, wants))
        wanting = {rank for _, rank in told}
        groups: dict[int, ProcessGroup] = {}
        for ranks in sorted({pipeline for pipeline, _ in told}):
            for stage, rank in enumerate(ranks[:-1]):
                if rank in wanting:
                    group = torch.distributed.new_group([rank, ranks[-1]], backend="gloo")
                    # Other ranks than its own get a number.
                    if isinstance(group, ProcessGroup):
                        groups[stage] = group
        for group in groups.values():
            # What connects two ranks may stop both until they have met, which they do here.
            torch.distributed.broadcast(torch.zeros(1), own[-1], group)
        stage = pp_group.rank()
        delay = len(own) - stage
        if len(chunks) > 1:
            # Before that the chunks of this rank have to be through with the microbatch themselves.
            delay += chunks[0].config.microbatch_group_size_per_vp_stage
        if stage + 1 == len(own):
            return cls(positions, own[-1], receivers=groups, delay=delay)
        return cls(positions, own[-1], groups.get(stage), delay=delay)

    def send(self, tokens: Tensor, stages: Collection[int] | None = None) -> None:
        """On the last stage: hand out the tokens of the next microbatch. No other stage is waited
        for.

        Args:
            tokens: [s * b].
            stages: those that will take them; None is all that have exits.
        """
        message = self._new_message(tokens)
        works: list[Work] = []
        for stage, group in self._receivers.items():
            if stages is not None and stage not in stages:
                continue
            work = torch.distributed.broadcast(message, self._sender, group, async_op=True)
            assert work is not None
            works.append(work)
        self._sent.append((message, works))
        if self._taken:
            self._tokens.append(tokens.to(torch.int32))

    def _new_message(self, tokens: Tensor) -> Tensor:
        """Tokens in the host's memory that nothing else uses.

        Raises:
            RuntimeError: a message before could not be sent: a stage has died.
        """
        under_way = []
        for message, works in self._sent:
            if all(work.is_completed() for work in works):
                for work in works:
                    work.wait()
                self._spare.append(message)
            else:
                under_way.append((message, works))
        self._sent = under_way
        fitting = (at for at, one in enumerate(self._spare) if one.shape == tokens.shape)
        at = next(fitting, None)
        if at is None:
            return tokens.to("cpu", torch.int32, copy=True)
        return self._spare.pop(at).copy_(tokens)

    def take(self, position: int, count: int, device: torch.device) -> Tensor:
        """The tokens [s * b] of the microbatch that is the next one for an exit.

        Args:
            position: of the exit.
            count: how many there are.
            device: of the tokens.
        """
        number = self._taken[position] - self._first
        while number >= len(self._tokens):
            assert self._group is not None, "the last stage knows its own tokens"
            received = torch.empty(count, dtype=torch.int32)
            torch.distributed.broadcast(received, self._sender, self._group)
            self._tokens.append(received.to(device))
        tokens = self._tokens[number]
        self._taken[position] += 1
        while self._first < min(self._taken.values()):
            self._tokens.popleft()
            self._first += 1
        return tokens.long()
