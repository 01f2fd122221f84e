"""Self-speculative decoding beside full decoding: is it lossless, and how much faster?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams


@dataclass(frozen=True)
class Speculation:
    """Results of drafting at one exit.

    Attributes:
        exit_layer: where drafts come from.
        speedup: against the full model, both greedy.
        identical: share of the answers that are the full model's, token for token.
        drafted: share of the tokens that were drafts.
    """

    exit_layer: int
    speedup: float
    identical: float
    drafted: float


def measure_speculation(
    engine: EarlyExitEngine, prompts: Sequence[str], max_tokens: int
) -> Iterator[Speculation]:
    """Answer every prompt alternately in both modes, twice each, of which the faster time
    counts."""
    for layer in engine.exit_layers:
        common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
        settings = (
            SamplingParams(mode="full", **common),
            SamplingParams(mode="self_speculative", draft_exit_layer=layer, **common),
        )
        for one in settings:
            engine.generate(prompts[0], one)
        pairs = [[_faster(engine, prompt, one) for one in settings] for prompt in prompts]
        seconds = [sum(pair[i].statistics.decode_seconds for pair in pairs) for i in (0, 1)]
        layers = [number for pair in pairs for number in pair[1].exit_layers]
        yield Speculation(
            layer,
            seconds[0] / seconds[1],
            sum(full.token_ids == own.token_ids for full, own in pairs) / len(pairs),
            sum(number == layer for number in layers) / len(layers),
        )


def _faster(engine: EarlyExitEngine, prompt: str, params: SamplingParams) -> GenerationResult:
    twice = [engine.generate(prompt, params)[0] for _ in range(2)]
    return min(twice, key=lambda one: one.statistics.decode_seconds)
