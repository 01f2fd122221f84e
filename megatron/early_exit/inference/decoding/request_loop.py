"""What the loops that schedule requests have in common: how requests come and go."""

from abc import ABC, abstractmethod

from megatron.early_exit.inference.decoding.request import Request
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.inference.decoding.scheduler import Scheduler


class RequestLoop(ABC):
    """Takes requests in and lets them go; how they get their tokens is a subclass's own.

    Args:
        scheduler: gives out the slots.

    Attributes:
        requests: those under way, by their keys.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.requests: dict[int, Request] = {}

    def submit(self, request: Request) -> None:
        """Take in a request; it starts when a slot is free, and needs none where it is finished."""
        if not request.is_finished:
            self.requests[request.key] = request
            self.scheduler.add(request.key, request.length)

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.pop(key, None)
        if request is not None:
            request.cancel()
            self.scheduler.remove(key)

    @abstractmethod
    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Bring requests forward by one batch.

        Returns:
            The tokens that came of it. A request that failed has none, and an `error`.
        """
