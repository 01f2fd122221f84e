"""Tensor parallelism where only the first rank gets requests: the others repeat what it does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from megatron.early_exit.inference.distributed.control import ControlPlane, Message
from megatron.early_exit.inference.engine.loop import Loop
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.segment_loop import SegmentLoop
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GeneratedToken

BuildRequest = Callable[[Sequence[int], SamplingParams, int], Request]
"""Makes a request of a prompt, how to continue it, and its key."""


class TensorDriver:
    """A `SegmentLoop` that tells the other ranks of each call before it makes it.

    What the loop does follows from the calls alone, so that all ranks run the same batches. Calls
    that change nothing are not told: ranks without work wait for the next message.

    Args:
        loop: of this rank.
        control: messages to the other ranks.
        num_ranks: of the engine.
    """

    def __init__(self, loop: SegmentLoop, control: ControlPlane, num_ranks: int) -> None:
        self.loop, self.control, self.num_ranks = loop, control, num_ranks

    def submit(self, request: Request) -> None:
        """See `DecodingLoop`."""
        if not request.is_finished:
            params = asdict(request.params)
            order = {"kind": "submit", "key": request.key, "prompt": request.prompt_token_ids}
            self._tell({**order, "params": params, "group": request.sequence.group})
            self.loop.submit(request)

    def cancel(self, key: int) -> None:
        """See `DecodingLoop`."""
        if key in self.loop.requests:
            self._tell({"kind": "cancel", "key": key})
            self.loop.cancel(key)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """See `DecodingLoop`."""
        if not self.loop.requests:
            return []
        self._tell({"kind": "step"})
        return self.loop.step()

    def close(self) -> None:
        """Let the other ranks go."""
        self._tell({"kind": "close"})

    def _tell(self, message: Message) -> None:
        for rank in range(1, self.num_ranks):
            self.control.send(rank, message)


def repeat_calls(loop: Loop, control: ControlPlane, build: BuildRequest) -> None:
    """Make the calls that the first rank's `TensorDriver` tells of, until it closes. The requests
    that `build` makes are those of the first rank under the same keys."""
    while True:
        heard = control.receive()
        assert heard is not None
        message = heard[0]
        match message["kind"]:
            case "submit":
                params = SamplingParams(**message["params"])
                request = build(message["prompt"], params, message["key"])
                request.sequence.group = message["group"]
                loop.submit(request)
            case "cancel":
                loop.cancel(message["key"])
            case "step":
                loop.step()
            case "close":
                return
