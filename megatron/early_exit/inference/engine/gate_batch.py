"""Asks the gates of several exits at once.

What they say is one small product for all sequences and exits that have been passed since gates
were asked last, and, where reading a number means to wait for the device, one wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.early_exit.inference.model.gates import Gates
from megatron.early_exit.inference.model.kv_cache import Span, row_ends
from megatron.early_exit.inference.modes.mode import DecodingMode
from megatron.early_exit.inference.transfer import upload

Confidences = dict[tuple[int, int], float]
"""How sure gates are of the last position of sequences, by segment and slot."""


@dataclass(frozen=True, slots=True)
class GateAnswers:
    """What gates have said about the last position of sequences.

    Attributes:
        confidences: how sure they are.
    """

    confidences: Confidences = field(default_factory=dict)

    def confidence(self, segment: int, slot: int) -> float | None:
        """How sure the gate behind a segment is of the sequence in a slot; None where it has not
        been asked."""
        return self.confidences.get((segment, slot))

    def lets_out(self, segment: int, slot: int, mode: DecodingMode) -> bool:
        """Whether a gate has been asked, and lets the sequence in a slot leave."""
        answer = self.confidence(segment, slot)
        return answer is not None and mode.rule.takes(segment, answer)

    def refuses(self, segment: int, slot: int, mode: DecodingMode) -> bool:
        """Whether a gate has been asked, and the exit behind it need not be."""
        if mode.details or self.confidence(segment, slot) is None:
            return False
        return not self.lets_out(segment, slot, mode)


class GateBatch:
    """The gates to ask for batches that have been run one after another.

    Args:
        gates: of the model.
    """

    def __init__(self, gates: Gates) -> None:
        self._gates = gates
        self._exits: list[int] = []
        self._slots: list[int] = []
        self._streams: list[Tensor] = []
        self._known: Confidences = {}

    def add(
        self, segment: int, spans: Sequence[Span], asked: Sequence[int], hidden: Tensor
    ) -> None:
        """Add the gate of the exit behind a segment.

        Args:
            segment: has been run.
            spans: what has been run.
            asked: places of those spans about whose last position the gate is asked.
            hidden: [r, h], what came of it.
        """
        if not asked:
            return
        if len(asked) < len(hidden):
            ends = row_ends(spans)
            rows = [ends[place] - 1 for place in asked]
            hidden = hidden[rows[0] : rows[0] + 1] if len(rows) == 1 else _some(hidden, rows)
        self._streams.append(hidden)
        self._exits += [segment] * len(asked)
        self._slots += [spans[place].slot for place in asked]

    def answers(self) -> GateAnswers:
        """Evaluate the gates that have been added since the last call, and read their confidences
        at once; returns those of all."""
        if self._exits:
            streams = self._streams
            together = streams[0] if len(streams) == 1 else torch.cat(streams)
            found: list[float] = self._gates.confidences(self._exits, together).tolist()
            self._known |= zip(zip(self._exits, self._slots, strict=True), found, strict=True)
            self._exits, self._slots, self._streams = [], [], []
        return GateAnswers(self._known)


def _some(hidden: Tensor, rows: list[int]) -> Tensor:
    return hidden[upload(rows, hidden.device)]
