"""The speed and quality of a model at different confidence thresholds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic

from examples.budget import LEAST_PROMPTS, Measuring
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.scoring import Judge
from megatron.early_exit.evaluation.tradeoff import Answered, Point, by_curve, fastest, point
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams


@dataclass(frozen=True)
class Curve:
    """What is measured at several thresholds.

    Attributes:
        engine: answers, also as the full model that the curve is compared with.
        rule: with which exits answer, whatever its threshold.
    """

    engine: EarlyExitEngine
    rule: Rule = FULL


def engines(checkpoint: Path, can_compile: bool = True) -> dict[str, EarlyExitEngine]:
    """Load a model with "plain layers" and with "compiled layers"; only the former if nothing
    compiles.

    Args:
        checkpoint: to load.
        can_compile: load it with compiled layers, too.
    """
    # Every threshold computes the prompts itself: what another one has kept would help it.
    load = partial(
        EarlyExitEngine.from_checkpoint, checkpoint, prefix_caching=False, use_stored_rule=False
    )
    found = {"plain layers": load()}
    if not can_compile:
        return found
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

    What is timed is decoding, from the first token to the last. Where an exit gives the first one,
    that includes the prompt's deeper layers, while no part of the prompt is in the full model's
    time, which makes low thresholds look slower. Deeper layers of the last positions, which no
    token has needed, are not included, which makes them look faster. `tools/evaluate.py` times
    whole answers, and charges rules for these layers.

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
    judges = {name: Judge(curve.engine) for name, curve in curves.items()}
    return [
        _point(judges[name], name, threshold, results[name, threshold], results[name, None])
        for name, threshold in settings
    ]


def _point(
    judge: Judge,
    curve: str,
    threshold: float | None,
    answers: Sequence[GenerationResult],
    full: Sequence[GenerationResult],
) -> Point:
    return point(
        curve,
        threshold,
        [_answered(judge, *pair) for pair in zip(answers, full, strict=True)],
    )


def _answered(judge: Judge, answer: GenerationResult, full: GenerationResult) -> Answered:
    judged = judge.of(answer.prompt_token_ids, answer.token_ids)
    own, reference = answer.statistics, full.statistics
    return Answered(
        own.num_generated_tokens - 1,
        own.decode_seconds,
        reference.num_generated_tokens - 1,
        reference.decode_seconds,
        answer.exit_layers,
        [is_same for is_same, _ in judged],
        [a == b for a, b in zip(answer.token_ids, full.token_ids, strict=False)],
        [logprob for _, logprob in judged],
    )


def _params(curve: Curve, threshold: float | None, max_tokens: int) -> SamplingParams:
    rule = FULL if threshold is None else replace(curve.rule, threshold=threshold)
    return rule.params(max_tokens=max_tokens, ignore_eos=True)


def _speed(answers: Sequence[GenerationResult]) -> float:
    seconds = sum(answer.statistics.decode_seconds for answer in answers)
    tokens = sum(answer.statistics.num_generated_tokens - 1 for answer in answers)
    return tokens / seconds


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
