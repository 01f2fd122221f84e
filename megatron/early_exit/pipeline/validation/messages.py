"""Checks of what is sent and received."""

from typing import Literal

from megatron.early_exit.pipeline.actions import Action
from megatron.early_exit.pipeline.communication import (
    message_of,
    partner_stage,
    receive_of,
    send_of,
)
from megatron.early_exit.pipeline.data_flow import data_source
from megatron.early_exit.pipeline.validation.fault import Places

Sends = Literal["blocking", "buffered"]
"""When a send ends: when its receiver is in the matching receive, or at once. In both cases a rank
runs its list strictly one action at a time, and a receive ends when its message is there."""


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
            sent.setdefault((rank, partner), []).append(receive_of(action))
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
    lists = places.schedule.ranks
    position = [0] * len(lists)
    sent: set[Action] = set()
    runnable = set(range(len(lists)))
    while runnable:
        rank = runnable.pop()
        for action in lists[rank][position[rank] :]:
            if action.kind in ("SF", "SB"):
                receive = receive_of(action)
                receiver, at = places.of[receive]
                if sends == "blocking" and position[receiver] != at:
                    break
                sent.add(receive)
                runnable.add(receiver)
            elif action.is_communication and action not in sent:
                # The sender may be waiting for this rank to get here; it comes back to it then.
                sender = places.schedule.rank_of(partner_stage(action))
                if position[sender] == places.of[send_of(action)][1]:
                    runnable.add(sender)
                break
            position[rank] += 1
    waiting = [(rank, at) for rank, at in enumerate(position) if at < len(lists[rank])]
    if waiting:
        places.fail_at(f"with {sends} sends these steps wait for each other for ever", waiting)
