"""Self-speculative decoding beside full decoding: is it lossless, and how much faster?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams

Drafter = Mapping[str, Any]
"""Fields of a request that say who drafts."""


@dataclass(frozen=True)
class Speculation:
    """Results of one way to draft.

    Attributes:
        drafter: its name.
        speedup: against the full model, both greedy.
        identical: share of the answers that are the full model's, token for token.
        drafted: share of the tokens that were drafts.
        drafts: made for each verification.
        accepted: of them, by the final head.
        paused: share of the tokens for which nobody drafted, since it had not paid.
    """

    drafter: str
    speedup: float
    identical: float
    drafted: float
    drafts: float
    accepted: float
    paused: float


def drafters(engine: EarlyExitEngine) -> dict[str, Drafter]:
    """All ways to draft that a model has, by their names."""
    found: dict[str, Drafter] = {
        f"layer {layer}": {"draft_exit_layer": layer} for layer in engine.exit_layers
    }
    if engine.num_mtp_depths:
        found["look-ahead head"] = {"draft_method": "mtp"}
        if engine.exit_layers:
            found["either"] = {"draft_method": "auto"}
    return found


def measure_speculation(
    engine: EarlyExitEngine,
    named: Mapping[str, Drafter],
    prompts: Sequence[str],
    max_tokens: int,
) -> list[Speculation]:
    """Answer every prompt with the full model and with each drafter in turns, twice each, of which
    the faster time counts."""
    common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    full = SamplingParams(mode="full", **common)
    settings = {
        name: SamplingParams(mode="self_speculative", **drafter, **common)
        for name, drafter in named.items()
    }
    for one in (full, *settings.values()):
        engine.generate(prompts[0], one)
    answers: dict[str, list[GenerationResult]] = {name: [] for name in settings}
    references = []
    for prompt in prompts:
        references.append(_faster(engine, prompt, full))
        for name, one in settings.items():
            answers[name].append(_faster(engine, prompt, one))
    return [_speculation(name, found, references) for name, found in answers.items()]


def _speculation(
    name: str, found: Sequence[GenerationResult], references: Sequence[GenerationResult]
) -> Speculation:
    counts = [one.statistics.drafts for one in found if one.statistics.drafts is not None]
    passes = sum(one.verifications - one.undrafted for one in counts)
    accepted = sum(one.accepted for one in counts)
    tokens = sum(len(one.token_ids) for one in found)
    return Speculation(
        name,
        _seconds(references) / _seconds(found),
        sum(a.token_ids == b.token_ids for a, b in zip(references, found, strict=True))
        / len(found),
        accepted / tokens,
        sum(one.drafted for one in counts) / max(passes, 1),
        accepted / max(passes, 1),
        sum(one.undrafted for one in counts) / tokens,
    )


def _seconds(answers: Sequence[GenerationResult]) -> float:
    return sum(answer.statistics.decode_seconds for answer in answers)


def _faster(engine: EarlyExitEngine, prompt: str, params: SamplingParams) -> GenerationResult:
    twice = [engine.generate(prompt, params)[0] for _ in range(2)]
    return min(twice, key=lambda one: one.statistics.decode_seconds)


def speculation_table(found: Sequence[Speculation]) -> str:
    """The results as text, a line for each drafter."""
    lines = ["drafts of          speed-up  same text  drafted   drafts  accepted   paused"]
    lines += [
        f"{one.drafter:<18} {one.speedup:7.2f}x {one.identical:10.0%} {one.drafted:8.0%} "
        f"{one.drafts:8.2f} {one.accepted:9.2f} {one.paused:8.0%}"
        for one in found
    ]
    return "\n".join(lines)
