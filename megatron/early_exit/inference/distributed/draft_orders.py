"""What the driver of a pipeline has the multi-token-prediction module draft, on the last stage.

The driver sends orders to the last stage at once, past the stages between: when a token is known,
what came before it has been through all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from megatron.early_exit.inference.distributed.control import Message
from megatron.early_exit.inference.distributed.stage_task import HeadMessage
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import MTP


@dataclass(frozen=True, slots=True)
class DraftOrder:
    """Drafts of one sequence that are wanted behind its tokens and those drafts that it has.

    Attributes:
        key: of the request.
        slot: where the sequence is.
        start: tokens that the last stage knows from the orders before.
        tokens: those behind them, final ones.
        drafts: those that the module has made behind them and the driver has taken.
        most: how many more are wanted, each behind the most probable ones before it.
        logits: they are wanted, too; then `most` is 1.
    """

    key: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    drafts: tuple[int, ...]
    most: int
    logits: bool = False

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> "DraftOrder":
        """The inverse of `asdict`, from JSON values."""
        lists = {name: tuple(message[name]) for name in ("tokens", "drafts")}
        return cls(**{**message, **lists})


class DraftOrders:
    """The driver's account of what it has ordered.

    Args:
        send: gives a message to the last stage, which answers with a `drafted_message` for each
            order in it.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._wanted: dict[int, Request] = {}
        self._num_known: dict[int, int] = {}
        """Tokens of each sequence that the last stage knows."""

    def add(self, request: Request) -> None:
        """Order what the mode of a request lets the module draft, with the next call of `send`."""
        self._wanted[request.key] = request

    def send(self) -> None:
        """Send what has been ordered since the last time."""
        if not self._wanted:
            return
        orders = [self._order(request) for request in self._wanted.values()]
        self._wanted.clear()
        self._send(orders_message(orders))

    def forget(self, key: int) -> None:
        """A sequence has left its slot: the last stage knows nothing of it any more."""
        self._wanted.pop(key, None)
        self._num_known.pop(key, None)

    def _order(self, request: Request) -> DraftOrder:
        sequence, mode = request.sequence, request.mode
        start, end = self._num_known.get(request.key, 0), sequence.num_final
        self._num_known[request.key] = end
        # Which token is drawn depends on what the request has got so far, which the driver knows.
        is_drawn = not mode.sampler.is_always_greedy
        return DraftOrder(
            request.key,
            sequence.slot,
            start,
            tuple(sequence.token_ids(start, end)),
            tuple(sequence.drafts),
            1 if is_drawn else mode.num_ahead,
            is_drawn,
        )


def orders_message(orders: list[DraftOrder]) -> Message:
    """Orders for the last stage."""
    return {"kind": "draft", "orders": [asdict(order) for order in orders]}


def orders_of(message: Message) -> list[DraftOrder]:
    """The inverse of `orders_message`."""
    return [DraftOrder.from_message(order) for order in message["orders"]]


def drafted_message(order: DraftOrder, outputs: list[HeadOutput]) -> Message:
    """What the module says of the tokens that an order wants, up to the first that is not
    finite."""
    heads = [asdict(HeadMessage.of(MTP, output)) for output in outputs]
    return {"kind": "drafted", "key": order.key, "outputs": heads}


def outputs_of(message: Message, logits: Tensor) -> list[HeadOutput]:
    """The inverse of `drafted_message`, with logits [v] that came beside it."""
    return [HeadMessage(**output).output(logits) for output in message["outputs"]]
