"""When something that should make decoding faster pauses, since it has not.

What it gains is counted in steps of the full model. It may lose a few of them; then there is a
pause, and the next pause is twice as long, unless it has paid in between. So what is lost in the
long run is a small share of the time, however bad it is.
"""

MOST_LOST = 1.5
"""Steps of the full model that may be lost before a pause."""
CREDIT = 1.0
"""Steps that may be lost besides at first: a text often begins with what is hard to foresee."""
_MOST_GAINED = 4.0
"""What has been gained counts up to here: the text may have changed since."""
SHORTEST_PAUSE, LONGEST_PAUSE = 150, 2400
"""Tokens."""


class Pauses:
    """Keeps the account of one sequence.

    Args:
        credit: steps of the full model that may be lost besides at first; None is CREDIT.
    """

    def __init__(self, credit: float | None = None) -> None:
        self._next = SHORTEST_PAUSE
        self._balance = CREDIT if credit is None else credit

    def add(self, gain: float) -> int:
        """Add what some tokens have gained, in steps of the full model.

        Returns:
            Tokens to go on without; 0 where it pays, as far as is known.
        """
        self._balance = min(self._balance + gain, _MOST_GAINED)
        if self._balance >= _MOST_GAINED:
            self._next = SHORTEST_PAUSE
        if self._balance > -MOST_LOST:
            return 0
        pause, self._balance = self._next, 0.0
        self._next = min(2 * pause, LONGEST_PAUSE)
        return pause
