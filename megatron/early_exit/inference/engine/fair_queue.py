"""Who is next: groups take turns, whatever the number of those that wait in each."""

from collections import deque
from collections.abc import Mapping


class FairQueue:
    """Keys that wait, each in a group; within one they come in the order of their arrival.

    Next is a group that has the least already; among equals the one that has waited longest since
    its last turn, or since its arrival.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, deque[int]] = {}
        self._groups: dict[int, int] = {}
        self._last_turns: dict[int, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, key: int, group: int) -> None:
        """Add a key that has arrived."""
        if group not in self._waiting:
            self._waiting[group] = deque()
            self._last_turns[group] = self._next_turn()
        self._waiting[group].append(key)
        self._groups[key] = group

    def remove(self, key: int) -> None:
        """Remove a key that no longer waits; does nothing where it has not waited."""
        group = self._groups.pop(key, None)
        if group is not None:
            self._waiting[group].remove(key)
            self._tidy(group)

    def take(self, held: Mapping[int, int] | None = None, most: int | None = None) -> int | None:
        """Take out the key whose turn it is; None where there is none.

        Args:
            held: what groups have already; others have nothing.
            most: a group that has so much already gets no more.
        """
        has = held or {}
        groups = [g for g in self._waiting if most is None or has.get(g, 0) < most]
        if not groups:
            return None
        group = min(groups, key=lambda one: (has.get(one, 0), self._last_turns[one]))
        key = self._waiting[group].popleft()
        del self._groups[key]
        self._last_turns[group] = self._next_turn()
        self._tidy(group)
        return key

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _tidy(self, group: int) -> None:
        if not self._waiting[group]:
            del self._waiting[group], self._last_turns[group]
