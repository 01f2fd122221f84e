"""Checks of what is sent and received."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.check.fault import Places
from megatron.early_exit.schedules.communication import message_of, partner_of, partner_stage
from megatron.early_exit.schedules.data_flow import data_source

Sends = Literal["blocking", "batched", "buffered"]
"""How a rank runs the sends and receives of its list, whose order it always keeps.

blocking: one at a time, each until its partner is at the matching receive or send.
batched: neighbouring ones are posted together, and each is done when its partner is posted, too;
    the rank goes on when all are done (Megatron's batched communication).
buffered: a send is done at once, a receive when its message has been sent.
"""


def check_messages(places: Places) -> None:
    """Check that each result which a neighbour needs is sent and received, in matching order.

    Raises:
        ScheduleError: with an explanation.
    """
    schedule = places.schedule
    computations = schedule.computations.actions
    needed: set[Action] = set()
    for action in places.of:
        if action.is_communication:
            continue
        source = data_source(action, computations)
        if source is None or schedule.rank_of(source.stage) == schedule.rank_of(action.stage):
            continue
        send, receive = message_of(source)
        needed |= {send, receive}
        for message, computation in ((send, source), (receive, action)):
            if message not in places.of:
                places.fail(f"{computation} has no {message}", computation)
        if places.of[send] < places.of[source]:
            places.fail(f"{send} comes before {source}, whose result it sends", send, source)
        if places.of[receive] > places.of[action]:
            places.fail(f"{receive} comes after {action}, which needs it", receive, action)
    for action in places.of:
        if action.is_communication and action not in needed:
            places.fail(f"nothing needs {action}", action)
    _check_order(places)


def _check_order(places: Places) -> None:
    rank_of = places.schedule.rank_of
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for action in places.of:
        rank, partner = rank_of(action.stage), rank_of(partner_stage(action))
        if action.kind in ("SF", "SB"):
            sent.setdefault((rank, partner), []).append(partner_of(action))
        elif action.is_communication:
            received.setdefault((partner, rank), []).append(action)
    for (sender, receiver), expected in sent.items():
        for first, second in zip(expected, received[sender, receiver], strict=True):
            if first != second:
                places.fail(
                    f"rank {sender} sends to {first} while rank {receiver} is at {second}, "
                    "allowed: the same order on both ranks",
                    first,
                    second,
                )


def check_waiting(places: Places, sends: Sends) -> None:
    """Run the lists; that computations come after what they need was checked before.

    Raises:
        ScheduleError: steps wait for each other for ever.
    """
    batches = [list(_batches(actions, sends)) for actions in places.schedule.ranks]
    position = [0] * len(batches)
    num_pending = [0] * len(batches)
    posted: set[Action] = set()

    def is_waiting(action: Action) -> bool:
        is_done_at_once = sends == "buffered" and action.kind in ("SF", "SB")
        return not is_done_at_once and partner_of(action) not in posted

    runnable = list(range(len(batches)))
    while runnable:
        rank = runnable.pop()
        while not num_pending[rank] and position[rank] < len(batches[rank]):
            for action in batches[rank][position[rank]]:
                partner = partner_of(action)
                was_waiting = partner in posted and is_waiting(partner)
                posted.add(action)
                num_pending[rank] += is_waiting(action)
                if was_waiting:
                    other = places.of[partner][0]
                    num_pending[other] -= 1
                    if not num_pending[other]:
                        position[other] += 1
                        runnable.append(other)
            if not num_pending[rank]:
                position[rank] += 1
    waiting = [
        places.of[action]
        for rank, at in enumerate(position)
        if at < len(batches[rank])
        for action in batches[rank][at]
        if is_waiting(action)
    ]
    if waiting:
        places.fail_at(f"with {sends} sends these steps wait for each other for ever", waiting)


def _batches(actions: Sequence[Action], sends: Sends) -> Iterator[list[Action]]:
    """What is posted together, in the order of the list; computations wait for nobody."""
    for is_communication, group in groupby(actions, key=lambda action: action.is_communication):
        if is_communication and sends == "batched":
            yield list(group)
        elif is_communication:
            yield from ([action] for action in group)
