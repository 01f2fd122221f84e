"""The speed and quality of a model at different confidence thresholds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

import torch

from examples.budget import LEAST_PROMPTS, Measuring
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams


@dataclass(frozen=True)
class Point:
    """What one threshold gives, against the full model measured beside it.

    Attributes:
        layers: "plain" or "compiled".
        threshold: least confidence to leave at an exit; None is the full model.
        tokens_per_second: speed of decoding.
        speedup: against the full model with the same layers.
        mean_exit_layer: number of layers run for a token, on average.
        agreement: share of tokens that the full model would choose after the same text.
        identical: share of tokens at the place where the full model's own answer has the same one.
    """

    layers: str
    threshold: float | None
    tokens_per_second: float
    speedup: float
    mean_exit_layer: float
    agreement: float
    identical: float


def engines(checkpoint: Path, dtype: torch.dtype | None = None) -> dict[str, EarlyExitEngine]:
    """A model with plain and with compiled layers; without the latter where nothing compiles."""
    found = {"plain": EarlyExitEngine.from_checkpoint(checkpoint, dtype=dtype)}
    try:
        found["compiled"] = EarlyExitEngine.from_checkpoint(checkpoint, dtype=dtype, compile=True)
    except ValueError as error:
        print(f"   only plain layers are measured: {error}")
    return found


def measure(
    engines: Mapping[str, EarlyExitEngine],
    prompts: Sequence[str],
    most: Measuring,
    seconds: float = math.inf,
) -> list[Point]:
    """Decode prompts with the full model and at every threshold, all greedily.

    The settings take turns prompt by prompt, so that whatever else the machine does slows all of
    them alike, and each answers every prompt several times, the fastest time counts. The full
    model's point comes first, of each engine.

    Args:
        engines: see `engines`.
        prompts: texts that the model has not seen.
        most: what is measured if the time allows.
        seconds: that it may take; less is measured where more would not fit, and said.
    """
    start = monotonic()
    token_seconds = 0.0
    for engine in engines.values():
        # The first answers pay for allocations.
        warm = [engine.generate(prompts[0], _params(None, 16))[0] for _ in range(2)]
        token_seconds += 1 / _speed(warm[1:])
    part = most.within(seconds - (monotonic() - start), token_seconds)
    if part != most:
        print(f"   measured in part, for want of time: {part.describe()}", flush=True)
    settings = list(product(engines, (None, *part.thresholds)))
    results: dict[tuple[str, float | None], list[GenerationResult]] = {one: [] for one in settings}
    for name, threshold in settings:
        engines[name].generate(prompts[0], _params(threshold, 8))
    for number, prompt in enumerate(prompts[: part.prompts]):
        if number >= LEAST_PROMPTS and monotonic() - start > seconds:
            print(f"   time is up with {number} prompts: others run here", flush=True)
            break
        for name, threshold in settings:
            params = _params(threshold, part.tokens)
            answers = [engines[name].generate(prompt, params)[0] for _ in range(part.repeats)]
            results[name, threshold].append(
                min(answers, key=lambda one: one.statistics.decode_seconds)
            )
    agreements = {name: _Agreement(engine) for name, engine in engines.items()}
    return [
        _point(agreements[name], name, threshold, results[name, threshold], results[name, None])
        for name, threshold in settings
    ]


class _Agreement:
    """Which tokens of an answer are the full model's choices, each text looked at once: answers at
    neighbouring thresholds are often the same."""

    def __init__(self, engine: EarlyExitEngine) -> None:
        self.engine = engine
        self._found: dict[tuple[int, ...], list[bool]] = {}

    def of(self, answer: GenerationResult) -> list[bool]:
        text = (*answer.prompt_token_ids, *answer.token_ids)
        if text not in self._found:
            best = self.engine.argmax_tokens(text)[len(answer.prompt_token_ids) - 1 :]
            self._found[text] = [a == b for a, b in zip(answer.token_ids, best, strict=False)]
        return self._found[text]


def _point(
    agreement: _Agreement,
    layers: str,
    threshold: float | None,
    answers: Sequence[GenerationResult],
    full: Sequence[GenerationResult],
) -> Point:
    return Point(
        layers,
        threshold,
        _speed(answers),
        _speed(answers) / _speed(full),
        mean(layer for answer in answers for layer in answer.exit_layers),
        mean(flag for answer in answers for flag in agreement.of(answer)),
        mean(
            a == b
            for answer, reference in zip(answers, full, strict=True)
            for a, b in zip(answer.token_ids, reference.token_ids, strict=False)
        ),
    )


def _params(threshold: float | None, max_tokens: int) -> SamplingParams:
    common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    if threshold is None:
        return SamplingParams(mode="full", **common)
    return SamplingParams(mode="early_exit", early_exit_threshold=threshold, **common)


def _speed(answers: Sequence[GenerationResult]) -> float:
    seconds = sum(answer.statistics.decode_seconds for answer in answers)
    tokens = sum(answer.statistics.num_generated_tokens - 1 for answer in answers)
    return tokens / seconds


def fastest(points: Sequence[Point], least_agreement: float) -> Point:
    """The fastest point with at least that agreement, of those with the same layers; the full
    model's agrees with itself."""
    return max((p for p in points if p.agreement >= least_agreement), key=lambda p: p.speedup)


def by_layers(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each engine."""
    return {
        layers: [point for point in points if point.layers == layers]
        for layers in dict.fromkeys(point.layers for point in points)
    }


def table(points: Sequence[Point]) -> str:
    """The points as text: a line for each threshold, with the speeds of each engine."""
    columns = by_layers(points)
    first = "".join(f"{layers + ' layers':>22}" for layers in columns)
    head = "threshold " + "  tokens/s   speed-up" * len(columns)
    rows = []
    for row in zip(*columns.values(), strict=True):
        speeds = "".join(f"{p.tokens_per_second:11.1f} {p.speedup:9.2f}x" for p in row)
        p = row[0]
        name = "full model" if p.threshold is None else format(p.threshold, ".2f")
        rows.append(
            f"{name:>10}{speeds} {p.mean_exit_layer:11.1f} {p.agreement:13.1%} {p.identical:10.1%}"
        )
    head = f"{head}   exit layer   agreement  same text"
    return "\n".join([" " * 10 + first, head, *rows])


_WHY_ALL = (
    "   Every threshold keeps as much: after so few steps the layers behind the first exit add "
    "little to it. After more steps (--minutes) they do, and low thresholds cost quality."
)


def verdict(points: Sequence[Point], least_agreement: float) -> str:
    """The fastest setting of each engine as a sentence; where that is the full model, and why."""
    lines = []
    for layers, own in by_layers(points).items():
        winner = fastest(own, least_agreement)
        where = "the full model" if winner.threshold is None else f"threshold {winner.threshold}"
        lines.append(
            f"Fastest with {least_agreement:.0%} of the full model's choices or more, {layers} "
            f"layers: {where}, {winner.speedup:.2f} times the full model's speed, "
            f"{winner.agreement:.1%} equal"
        )
        if winner.threshold is None:
            lines.append(_why_none(own, least_agreement))
    if all(point.agreement >= least_agreement for point in points):
        lines.append(_WHY_ALL)
    return "\n".join(lines)


def _why_none(points: Sequence[Point], least_agreement: float) -> str:
    """What keeps every threshold from being faster than the full model."""
    quick = [p for p in points if p.threshold is not None and p.speedup > 1]
    if not quick:
        return (
            "   No threshold is faster here: to ask an exit takes as long as the layers that it "
            "saves, of which a model this small has too few."
        )
    best = max(quick, key=lambda p: p.agreement)
    return (
        f"   Thresholds that are faster keep less: {best.threshold} is {best.speedup:.2f} times as "
        f"fast with {best.agreement:.1%} equal, less than {least_agreement:.0%}. Exits that were "
        "trained for longer agree more."
    )
