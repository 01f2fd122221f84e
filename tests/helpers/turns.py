"""Has all drafters of a sequence draft in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.early_exit.inference.modes.draft_choice import DraftChoice


@contextmanager
def drafting_in_turns() -> Iterator[set[int]]:
    """Have another drafter draft behind each verification, and none pause.

    Yields:
        The heads that have drafted, or have tried to.
    """
    drafted = set()

    def add(self: DraftChoice, *_: Any) -> int:
        heads = sorted(self.heads)
        drafted.add(self.current)
        self._begin(heads[(heads.index(self.current) + 1) % len(heads)])
        return 0

    with patch.object(DraftChoice, "add", add):
        yield drafted
