"""The speed and quality of a model at different confidence thresholds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams


@dataclass(frozen=True)
class Point:
    """What one threshold gives, against the full model measured beside it.

    Attributes:
        threshold: least confidence to leave at an exit; None is the full model.
        tokens_per_second: speed of decoding.
        speedup: against the full model.
        mean_exit_layer: number of layers run for a token, on average.
        agreement: share of tokens that the full model would choose after the same text.
        identical: share of tokens at the place where the full model's own answer has the same one.
    """

    threshold: float | None
    tokens_per_second: float
    speedup: float
    mean_exit_layer: float
    agreement: float
    identical: float


def measure(
    engine: EarlyExitEngine,
    prompts: Sequence[str],
    thresholds: Sequence[float],
    max_tokens: int,
) -> Iterator[Point]:
    """Decode every prompt with the full model and at every threshold, all greedily.

    The settings take turns prompt by prompt, so that whatever else the machine does slows all of
    them alike, and each answers every prompt twice, the faster time counts. Yields the full
    model's point first.
    """
    settings: list[float | None] = [None, *thresholds]
    results: dict[float | None, list[GenerationResult]] = {one: [] for one in settings}
    for warm_up in settings:
        engine.generate(prompts[0], _params(warm_up, 8))
    for prompt in prompts:
        for threshold in settings:
            params = _params(threshold, max_tokens)
            twice = [*engine.generate(prompt, params), *engine.generate(prompt, params)]
            results[threshold].append(min(twice, key=lambda one: one.statistics.decode_seconds))
    full = results[None]
    full_speed = _speed(full)
    for threshold, answers in results.items():
        yield Point(
            threshold,
            _speed(answers),
            _speed(answers) / full_speed,
            mean(layer for answer in answers for layer in answer.exit_layers),
            mean(flag for answer in answers for flag in _agreement(engine, answer)),
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


def _agreement(engine: EarlyExitEngine, answer: GenerationResult) -> list[bool]:
    first = len(answer.prompt_token_ids)
    best = engine.argmax_tokens([*answer.prompt_token_ids, *answer.token_ids])
    return [a == b for a, b in zip(answer.token_ids, best[first - 1 :], strict=False)]


def best(points: Sequence[Point], least_agreement: float) -> Point:
    """The fastest point with at least that agreement; the full model's agrees with itself."""
    return max((p for p in points if p.agreement >= least_agreement), key=lambda p: p.speedup)


def table(points: Sequence[Point]) -> str:
    """The points as text."""
    head = "threshold   tokens/s   speed-up   mean exit layer   agrees with full   same text"
    rows = [
        f"{'full model' if p.threshold is None else format(p.threshold, '.2f'):>10} "
        f"{p.tokens_per_second:9.1f} {p.speedup:9.2f}x {p.mean_exit_layer:15.1f} "
        f"{p.agreement:17.1%} {p.identical:12.1%}"
        for p in points
    ]
    return "\n".join([head, *rows])
