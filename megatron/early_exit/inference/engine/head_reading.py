"""From logits on a device to what heads say, with the tokens that they may have to give.

Where reading a number means to wait for the device, everything is computed ahead and read together:
also tokens that in the end another head gives. On the host only what is needed is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.gate_batch import GateAnswers
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.modes.batch_sampler import DrawBatch, draw
from megatron.early_exit.inference.modes.draw import Draw
from megatron.early_exit.inference.modes.head_output import (
    HeadOutput,
    head_figures,
    head_outputs,
    outputs_of,
)
from megatron.early_exit.inference.modes.measures import Judging
from megatron.early_exit.inference.modes.mode import DecodingMode
from megatron.early_exit.inference.modes.rows import some_rows
from megatron.early_exit.inference.transfer import download

HeadOutputs = dict[tuple[int, int], list[HeadOutput]]
"""What heads say about the positions that they were asked about, by segment and slot."""


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One head to evaluate for the last positions of some spans.

    Attributes:
        segment: the one that the head is behind.
        head: index of the exit, or FINAL.
        spans: of each sequence.
        modes: for each span the mode of its sequence.
        counts: for each span the number of positions.
        hidden: [r, h], what has run.
        rows: those of it that the head is asked about.
    """

    segment: int
    head: int
    spans: list[Span]
    modes: list[DecodingMode]
    counts: list[int]
    hidden: Tensor
    rows: list[int]


@dataclass(frozen=True, slots=True)
class HeadLogits:
    """What some calls have given, in one product.

    Attributes:
        calls: which.
        logits: [n, v] in fp32, of all their rows.
        known_figures: [3, n], see `head_figures`, where they have come with the logits.
        judging: what confidences of rows are; None is the largest probabilities.
    """

    calls: Sequence[HeadCall]
    logits: Tensor
    known_figures: Tensor | None = None
    judging: Judging | None = None

    @property
    def figures(self) -> Tensor:
        """What is read of the logits, [3, n], on their device."""
        return head_figures(self.logits) if self.known_figures is None else self.known_figures


def read(logits: Sequence[HeadLogits], answers: GateAnswers) -> HeadOutputs:
    """Read what the heads of some calls say, and draw the tokens that they have to give.

    Args:
        logits: of the calls.
        answers: what gates have said before, which are the confidences of those exits.
    """
    if all(one.logits.device.type == "cpu" for one in logits):
        found = [head_outputs(one.logits, one.figures, one.judging) for one in logits]
        outputs = _outputs(logits, found, answers)
        _draw_what_is_needed(logits, outputs)
        return outputs
    return _read_ahead(logits, answers)


def _outputs(
    logits: Sequence[HeadLogits], found_of: Sequence[list[HeadOutput]], answers: GateAnswers
) -> HeadOutputs:
    outputs: HeadOutputs = {}
    for one, found in zip(logits, found_of, strict=True):
        first = 0
        for call in one.calls:
            for span, count in zip(call.spans, call.counts, strict=True):
                own = found[first : first + count]
                answer = answers.confidence(call.segment, span.slot)
                if answer is not None:
                    own = [replace(output, confidence=answer) for output in own]
                outputs[call.segment, span.slot] = own
                first += count
    return outputs


def _draw_what_is_needed(logits: Sequence[HeadLogits], outputs: HeadOutputs) -> None:
    """Put tokens to the outputs of the first head of each sequence that has to give some."""
    calls = [call for one in logits for call in one.calls if _may_draw(call)]
    wanted: list[tuple[list[HeadOutput], int, Draw]] = []
    given: set[int] = set()
    for call in sorted(calls, key=lambda call: call.segment):
        for span, mode in zip(call.spans, call.modes, strict=True):
            if mode.sampler.is_always_greedy or span.slot in given:
                continue
            found = outputs[call.segment, span.slot]
            if not all(one.is_finite for one in found):
                continue
            for place, one in enumerate(mode.draws(call.head, found)):
                if one is not None:
                    wanted.append((found, place, one))
                    given.add(span.slot)
    if not wanted:
        return
    drawn = draw([found[place].logits for found, place, _ in wanted], [one for *_, one in wanted])
    for (found, place, _), token in zip(wanted, drawn, strict=True):
        found[place] = replace(found[place], drawn=token)


def _may_draw(call: HeadCall) -> bool:
    return any(not mode.sampler.is_always_greedy for mode in call.modes)


def _read_ahead(logits: Sequence[HeadLogits], answers: GateAnswers) -> HeadOutputs:
    """Draw all tokens that may be needed, and read everything at once."""
    draws: dict[int, Draw] = {}
    best: dict[int, list[int]] = {}
    places: list[tuple[tuple[int, int], int]] = []
    for own in logits:
        for call in own.calls:
            for span, mode, count in zip(call.spans, call.modes, call.counts, strict=True):
                first = len(places)
                places += [((call.segment, span.slot), place) for place in range(count)]
                if not mode.sampler.is_always_greedy:
                    asked = enumerate(mode.draws(call.head), start=first)
                    draws.update((row, one) for row, one in asked if one is not None)
                if num_best := mode.sampler.params.logprobs:
                    best.setdefault(num_best, []).extend(range(first, len(places)))
    figures = [one.figures for one in logits]
    judged: list[list[int]] = []
    first = 0
    for own, known in zip(logits, tuple(figures), strict=True):
        others = () if own.judging is None else own.judging.confidences(own.logits, known)
        for rows, confidences in others:
            judged.append([first + row for row in rows])
            figures.append(confidences)
        first += len(own.logits)
    batch = None
    if draws or best:
        parts = [one.logits for one in logits]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
    if draws:
        batch = DrawBatch(some_rows(together, list(draws))[0], list(draws.values()))
        figures.append(batch.figures)
    for num_best, rows in best.items():
        largest = some_rows(together, rows)[0].topk(min(num_best, together.shape[-1]))
        # fp32 holds every token exactly, see `head_figures`.
        figures.append(torch.stack((largest.indices.to(torch.float32), largest.values)))
    numbers = download(figures)
    found = [outputs_of(one.logits, numbers.pop(0)) for one in logits]
    outputs = _outputs(logits, found, answers)

    def add(row: int, **fields: Any) -> None:
        key, place = places[row]
        outputs[key][place] = replace(outputs[key][place], **fields)

    for rows in judged:
        for row, confidence in zip(rows, numbers.pop(0), strict=True):
            add(row, confidence=confidence)
    if batch is not None:
        for row, one in zip(draws, batch.read(numbers.pop(0)), strict=True):
            add(row, drawn=one)
    for rows, (tokens, values) in zip(best.values(), numbers, strict=True):
        for row, ids, own in zip(rows, tokens, values, strict=True):
            add(row, best=tuple(zip(map(int, ids), own, strict=True)))
    return outputs
