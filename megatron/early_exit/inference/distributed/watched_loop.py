"""The loops of an engine: what they have in common, and what watches over one."""

from typing import Protocol

from megatron.early_exit.inference.distributed.heartbeat import Heartbeat
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.results import GeneratedToken


class Loop(Protocol):
    """What takes requests to their ends, see `DecodingLoop`."""

    def submit(self, request: Request) -> None: ...

    def cancel(self, key: int) -> None: ...

    def step(self) -> list[tuple[Request, GeneratedToken]]: ...


class WatchedLoop:
    """A loop that needs all processes to be alive while it runs.

    Args:
        loop: what does the work.
        heartbeat: knows who is alive.
    """

    def __init__(self, loop: Loop, heartbeat: Heartbeat) -> None:
        self.loop, self._heartbeat = loop, heartbeat

    def submit(self, request: Request) -> None:
        """See `DecodingLoop`."""
        self.loop.submit(request)

    def cancel(self, key: int) -> None:
        """See `DecodingLoop`."""
        self.loop.cancel(key)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """See `DecodingLoop`."""
        with self._heartbeat.working():
            return self.loop.step()
