"""The speed and quality of a model at different confidence thresholds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from examples.budget import LEAST_PROMPTS, Measuring
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams


@dataclass(frozen=True)
class Curve:
    """What is measured at several thresholds.

    Attributes:
        engine: answers, also as the full model that the curve is compared with.
        options: further fields of the requests in mode `early_exit`.
    """

    engine: EarlyExitEngine
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """Results for one threshold, relative to the full model, which is measured alternately.

    Attributes:
        curve: name of the curve that it belongs to.
        threshold: least confidence to leave at an exit; None is the full model.
        tokens_per_second: speed of decoding.
        speedup: against the curve's own full model.
        mean_exit_layer: number of layers run for a token, on average.
        agreement: share of tokens that the full model would choose after the same text.
        identical: share of positions at which the full model's own answer has the same token.
        perplexity: of the answers, by the full model.
    """

    curve: str
    threshold: float | None
    tokens_per_second: float
    speedup: float
    mean_exit_layer: float
    agreement: float
    identical: float
    perplexity: float


def engines(checkpoint: Path) -> dict[str, EarlyExitEngine]:
    """Load a model with "plain layers" and with "compiled layers"; only the former if nothing
    compiles."""
    # Every threshold computes the prompts itself: what another one has kept would help it.
    load = partial(EarlyExitEngine.from_checkpoint, checkpoint, prefix_caching=False)
    found = {"plain layers": load()}
    try:
        found["compiled layers"] = load(compile=True)
    except ValueError as error:
        print(f"   only plain layers are measured: {error}")
    return found


def measure(
    curves: Mapping[str, Curve],
    prompts: Sequence[str],
    most: Measuring,
    seconds: float = math.inf,
) -> list[Point]:
    """Decode prompts with the full model and at every threshold, all greedily.

    The settings alternate prompt by prompt, so that other work on the machine slows all of them
    equally. Each setting answers every prompt several times, of which the fastest counts. The full
    model's point comes first for each engine.

    Args:
        engines: see `engines`.
        prompts: texts that the model has not seen.
        most: what is measured if the time allows.
        seconds: time limit; if it does not suffice for `most`, less is measured and a line says so.
    """
    start = monotonic()
    token_seconds = 0.0
    for curve in curves.values():
        # The first answers pay for allocations.
        warm = [curve.engine.generate(prompts[0], _params(curve, None, 16))[0] for _ in range(2)]
        token_seconds += 1 / _speed(warm[1:])
    part = most.within(seconds - (monotonic() - start), token_seconds)
    if part != most:
        print(f"   time is short, so only this is measured: {part.describe()}", flush=True)
    settings = list(product(curves, (None, *part.thresholds)))
    results: dict[tuple[str, float | None], list[GenerationResult]] = {one: [] for one in settings}
    for name, threshold in settings:
        curves[name].engine.generate(prompts[0], _params(curves[name], threshold, 8))
    for number, prompt in enumerate(prompts[: part.prompts]):
        if number >= LEAST_PROMPTS and monotonic() - start > seconds:
            print(f"   time is up after {number} prompts: other work slows this", flush=True)
            break
        for name, threshold in settings:
            engine, params = curves[name].engine, _params(curves[name], threshold, part.tokens)
            answers = [engine.generate(prompt, params)[0] for _ in range(part.repeats)]
            results[name, threshold].append(
                min(answers, key=lambda one: one.statistics.decode_seconds)
            )
    judges = {name: _Judge(curve.engine) for name, curve in curves.items()}
    return [
        _point(judges[name], name, threshold, results[name, threshold], results[name, None])
        for name, threshold in settings
    ]


class _Judge:
    """Tells what the full model thinks of the tokens of an answer. Each text is evaluated once,
    because answers at neighbouring thresholds are often equal."""

    def __init__(self, engine: EarlyExitEngine) -> None:
        self.engine = engine
        self._found: dict[tuple[int, ...], list[tuple[bool, float]]] = {}

    def of(self, answer: GenerationResult) -> list[tuple[bool, float]]:
        """Whether the full model would choose the token, and its log-probability."""
        text = (*answer.prompt_token_ids, *answer.token_ids)
        if text not in self._found:
            params = SamplingParams(max_tokens=0, prompt_logprobs=1)
            scores = self.engine.generate([list(text)], params)[0].prompt_tokens
            assert scores is not None
            self._found[text] = [
                (score.token_id == score.top_logprobs[0][0], score.logprob)
                for score in scores[len(answer.prompt_token_ids) :]
                if score.logprob is not None
            ]
        return self._found[text]


def _point(
    judge: _Judge,
    curve: str,
    threshold: float | None,
    answers: Sequence[GenerationResult],
    full: Sequence[GenerationResult],
) -> Point:
    judged = [one for answer in answers for one in judge.of(answer)]
    return Point(
        curve,
        threshold,
        _speed(answers),
        _speed(answers) / _speed(full),
        mean(layer for answer in answers for layer in answer.exit_layers),
        mean(is_same for is_same, _ in judged),
        mean(
            a == b
            for answer, reference in zip(answers, full, strict=True)
            for a, b in zip(answer.token_ids, reference.token_ids, strict=False)
        ),
        math.exp(-mean(logprob for _, logprob in judged)),
    )


def _params(curve: Curve, threshold: float | None, max_tokens: int) -> SamplingParams:
    common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    if threshold is None:
        return SamplingParams(mode="full", **common)
    common |= curve.options
    return SamplingParams(mode="early_exit", early_exit_threshold=threshold, **common)


def _speed(answers: Sequence[GenerationResult]) -> float:
    seconds = sum(answer.statistics.decode_seconds for answer in answers)
    tokens = sum(answer.statistics.num_generated_tokens - 1 for answer in answers)
    return tokens / seconds


def fastest(points: Sequence[Point], least_agreement: float) -> Point:
    """The fastest of these points with at least that agreement. There is always one, because the
    full model agrees with itself."""
    return max((p for p in points if p.agreement >= least_agreement), key=lambda p: p.speedup)


def by_curve(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each curve."""
    return {
        name: [point for point in points if point.curve == name]
        for name in dict.fromkeys(point.curve for point in points)
    }


def table(points: Sequence[Point]) -> str:
    """The points as text: a line for each threshold, with the speeds of each curve. What is said of
    quality is the first curve's, so all should have the same."""
    columns = by_curve(points)
    first = "".join(f"{name:>22}" for name in columns)
    head = f"{'threshold':<10}" + f"{'tokens/s':>11} {'speed-up':>10}" * len(columns)
    rows = []
    for row in zip(*columns.values(), strict=True):
        speeds = "".join(f"{p.tokens_per_second:11.1f} {p.speedup:9.2f}x" for p in row)
        p = row[0]
        name = "full model" if p.threshold is None else format(p.threshold, ".2f")
        rows.append(
            f"{name:>10}{speeds} {p.mean_exit_layer:10.1f} {p.agreement:10.1%} {p.identical:10.1%} "
            f"{p.perplexity:11.2f}"
        )
    head += f"{'exit layer':>11} {'agreement':>10} {'same text':>10} {'perplexity':>11}"
    return "\n".join([" " * 10 + first, head, *rows])


_WHY_ALL = (
    "   Every threshold agrees as much: after so few steps the layers after the first exit improve "
    "little on it. After more steps (--minutes) they do, and low thresholds cost quality."
)


def verdict(points: Sequence[Point], least_agreement: float) -> str:
    """A sentence that names the fastest setting of each curve; if that is the full model, it says
    why."""
    lines = []
    for name, own in by_curve(points).items():
        winner = fastest(own, least_agreement)
        where = "the full model" if winner.threshold is None else f"threshold {winner.threshold}"
        lines.append(
            f"Fastest setting with at least {least_agreement:.0%} agreement, {name}: "
            f"{where}, {winner.speedup:.2f} times the full model's speed, "
            f"{winner.agreement:.1%} agreement"
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
            "   No threshold is faster here: evaluating an exit takes as long as the layers that "
            "it saves, because a model this small has so few of them."
        )
    best = max(quick, key=lambda p: p.agreement)
    return (
        f"   Faster thresholds agree less: {best.threshold} is {best.speedup:.2f} times as fast "
        f"with {best.agreement:.1%} agreement, less than {least_agreement:.0%}. Exits that are "
        "trained for longer agree more."
    )
