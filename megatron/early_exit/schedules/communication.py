"""Makes the sends and receives of a schedule explicit, so that no rank can wait for ever.

All computations and messages are put into one order, that of a run in which a forward takes one
unit of time, a backward two, and a message none; the list of each rank is the part of this order
that concerns it. A message is one event of that order on both of its ranks. So whatever has run,
the first event that has not is possible, and there is no deadlock: neither if a send blocks until
its receiver is in the matching receive, nor if neighbouring sends and receives of a list are
posted together. The messages from one rank to another are received in the order in which they are
sent, so backends that match by order need no tags.
"""

from megatron.early_exit.schedules.actions import Action, Kind
from megatron.early_exit.schedules.data_flow import data_source, execution_order
from megatron.early_exit.schedules.schedule import Schedule

_PARTNER: dict[Kind, Kind] = {"SF": "RF", "RF": "SF", "SB": "RB", "RB": "SB"}
_UNITS: dict[Kind, int] = {"F": 1, "B": 2, "I": 1, "W": 1, "L": 1}


def partner_stage(action: Action) -> int:
    """The neighbouring stage that a forward or backward, send or receive has to do with."""
    return action.stage + (1 if action.kind in ("F", "SF", "RB") else -1)


def partner_of(message: Action) -> Action:
    """The receive that belongs to a send, or the send that belongs to a receive."""
    return Action(partner_stage(message), _PARTNER[message.kind], message.microbatch)


def message_of(source: Action) -> tuple[Action, Action]:
    """The send of a computation's result, and its receive on the neighbouring stage."""
    send = Action(source.stage, "SF" if source.kind == "F" else "SB", source.microbatch)
    return send, partner_of(send)


def with_communication(schedule: Schedule) -> Schedule:
    """The same schedule with its sends and receives; those it has already are placed anew.

    Raises:
        ValueError: the computations themselves wait for ever for each other.
    """
    order, stuck = execution_order(schedule)
    if stuck:
        raise ValueError(f"{stuck[0]} waits for ever, see `check` for an explanation")
    actions = schedule.computations.actions
    end: dict[Action, int] = {}
    rank_free = [0] * schedule.num_ranks
    # Messages come before computations of the same moment: one of these may need them.
    events: list[tuple[int, int, int, tuple[Action, ...]]] = []
    for action in order:
        rank = schedule.rank_of(action.stage)
        source = data_source(action, actions)
        start = max(rank_free[rank], end[source] if source else 0)
        if source is not None and schedule.rank_of(source.stage) != rank:
            events.append((end[source], 0, len(events), message_of(source)))
        end[action] = rank_free[rank] = start + _UNITS[action.kind]
        events.append((start, 1, len(events), (action,)))
    ranks: list[list[Action]] = [[] for _ in schedule.ranks]
    for _, _, _, parts in sorted(events, key=lambda event: event[:3]):
        for part in parts:
            ranks[schedule.rank_of(part.stage)].append(part)
    return Schedule(tuple(map(tuple, ranks)))
