"""Shared code of the decoding benchmarks: alternating measurements."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from figures import FigureTable, ratios

from megatron.early_exit.config import KVPolicy
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.early_exit import EarlyExitMode

PROMPT_LENGTH = 8
Turn = Callable[[], float]
"""Runs a setting once; returns seconds per token."""
_NEVER = 2.0
"""A threshold that no confidence reaches."""


class Decoder:
    """An engine of the project, with a fixed number of sequences at a time.

    Args:
        model: the model.
        batch: number of sequences.
        tokens: tokens of each sequence.
        max_pending: see `EarlyExitEngine`; by default the number of pending positions alone
            never triggers their computation.
    """

    def __init__(
        self, model: SegmentedModel, batch: int, tokens: int, max_pending: int | None = None
    ) -> None:
        self.batch, self.tokens = batch, tokens
        length = PROMPT_LENGTH + tokens + 1
        self.engine = EarlyExitEngine(
            model,
            max_pending=max_pending or length,
            max_batch_size=batch,
            max_sequence_length=length,
        )
        generator = random.Random(0)
        size = model.architecture.vocab_size
        self.prompts = [
            [generator.randrange(size) for _ in range(PROMPT_LENGTH)] for _ in range(batch)
        ]

    def seconds_per_token(
        self, params: Sequence[SamplingParams], thresholds: Sequence[object] | None = None
    ) -> float:
        """Seconds per token, from when all sequences have begun until the first one ends."""
        engine = self.engine
        requests = [engine.submit(*pair) for pair in zip(self.prompts, params, strict=True)]
        for request, threshold in zip(requests, thresholds or [], strict=False):
            # A benchmark's own object may stand in for the number.
            mode = request.mode
            assert isinstance(mode, EarlyExitMode)
            thresholds_of_exits = (threshold,) * len(mode.rule.exits)
            rule = replace(mode.rule, thresholds=thresholds_of_exits)  # type: ignore[arg-type]
            mode.asking = mode.rule = rule
        while not all(request.sequence.generated for request in requests):
            engine.step()
        before, start = sum(len(request.sequence.generated) for request in requests), perf_counter()
        while not any(request.is_finished for request in requests):
            engine.step()
        seconds = perf_counter() - start
        count = sum(len(request.sequence.generated) for request in requests) - before
        for request in requests:
            engine.cancel(request)
        return seconds / count

    def full(self) -> float:
        """Seconds per token in full mode."""
        return self.seconds_per_token([self._params()] * self.batch)

    def leaving(
        self,
        threshold: object,
        exits: Sequence[int] | None = None,
        kv_policy: KVPolicy = "exact",
    ) -> float:
        """Seconds per token with a threshold, or with an object made for each sequence that
        replaces it."""
        thresholds = [threshold(i) if callable(threshold) else threshold for i in range(self.batch)]
        return self.seconds_per_token([self._leaving(exits, kv_policy)] * self.batch, thresholds)

    def in_vain(self, exits_pay_at: int = 0) -> float:
        """Seconds per token if all exits are asked and no token leaves."""
        params = self._params(mode="early_exit", exits_pay_at=exits_pay_at)
        return self.seconds_per_token([params] * self.batch, [_NEVER] * self.batch)

    def drafting(self, **fields: Any) -> float:
        """Seconds per token with drafts of the first exit; fields of `SamplingParams` may say when
        it drafts."""
        params = self._params(mode="self_speculative", **fields)
        return self.seconds_per_token([params] * self.batch)

    def depths(self, exits: Sequence[int], kv_policy: KVPolicy = "exact") -> float:
        """Seconds per token if sequences leave, in turn, always at one of some exits or never."""
        kinds = [*(self._leaving((layer,), kv_policy) for layer in exits), self._params()]
        return self.seconds_per_token([kinds[i % len(kinds)] for i in range(self.batch)])

    def _params(self, **fields: Any) -> SamplingParams:
        return SamplingParams(max_tokens=self.tokens, ignore_eos=True, **fields)

    def _leaving(self, exits: Sequence[int] | None, kv_policy: KVPolicy) -> SamplingParams:
        layers = None if exits is None else tuple(exits)
        return self._params(
            mode="early_exit", early_exit_threshold=0.0, exit_layers=layers, kv_policy=kv_policy
        )


def timed(function: Callable[[], None], repeats: int) -> Turn:
    """Time a function: seconds of one call."""

    def turn() -> float:
        with torch.inference_mode():
            function()
            start = perf_counter()
            for _ in range(repeats):
                function()
        return (perf_counter() - start) / repeats

    return turn


def take_turns(settings: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Run each setting once per round, after a warm-up round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(rounds + 1):
        for name, turn in settings.items():
            seconds = turn()
            if number:
                times[name].append(seconds)
    return times


def add_in_vain(
    table: FigureTable, times: dict[str, list[float]], decoder: Decoder, bound: float | None
) -> None:
    """Report what asking exits costs where no token leaves: `Decoder.in_vain` over full mode.

    Args:
        table: gets the figures.
        times: of `in vain`, of the same with pauses (`in vain, paused`), and of `long full`.
        decoder: that has been timed.
        bound: of the figure with pauses.
    """
    company = f"{decoder.tokens} tokens"
    name = "exits asked in vain over full"
    table.add(name, ratios(times, "long full", "in vain"), None, 1.0, company)
    paused = ratios(times, "long full", "in vain, paused")
    table.add(f"{name}, exits_pay_at {decoder.batch}", paused, bound, 1.0, company)
