"""What the example measures of the tuned model, and the tables that it prints."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from examples.budget import Measuring
from examples.ee_tuning.smollm2.speculation import (
    Speculation,
    drafters,
    measure_speculation,
    speculation_table,
)
from examples.quickstart.tradeoff import Curve, measure
from megatron.early_exit.config import KVPolicy
from megatron.early_exit.evaluation.figures import save, tradeoff_curve
from megatron.early_exit.evaluation.rule import Rule
from megatron.early_exit.evaluation.tradeoff import Point, by_curve, fastest, table
from megatron.early_exit.inference import EarlyExitEngine

GOALS = ((0.9, 1.5), (0.95, 1.3))
"""Least agreement with the full model, and the speed over its own that is to be reached there."""
LEAST_LOSSLESS = 1.3
KV_POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)
PROMPT_CHARACTERS = 400


def held_out_prompts(validation: Path, count: int) -> list[str]:
    """The beginnings of some texts that the exits were not tuned on."""
    texts = [json.loads(line)["text"] for line in validation.open()]
    long = [text for text in texts if len(text) > 2 * PROMPT_CHARACTERS]
    step = max(1, len(long) // count)
    return [text[:PROMPT_CHARACTERS] for text in long[::step][:count]]


def report(
    engines: Mapping[str, EarlyExitEngine], work_dir: Path, most: Measuring, seconds: float
) -> None:
    """Measure, print and save.

    Args:
        engines: the models that are measured, by the names of their weights.
        work_dir: of the example.
        most: the measurement to make if the time allows.
        seconds: time limit.
    """
    prompts = held_out_prompts(work_dir / "data" / "validation.jsonl", most.prompts)
    start = time.monotonic()
    curves = {
        f"{name}, {policy}": Curve(engine, Rule(kv_policy=policy))
        for name, engine in engines.items()
        for policy in KV_POLICIES
    }
    # Drafters are measured beside the full model, thresholds together.
    swept = len(curves) * (1 + len(most.thresholds))
    ways = {name: drafters(engine) for name, engine in engines.items()}
    drafted = sum(1 + len(one) for one in ways.values())
    points = measure(curves, prompts, most, seconds * swept / (swept + drafted))
    for own in by_curve(points).values():
        print(f"\n{table(own)}")
    print()
    for own in by_curve(points).values():
        for agreement, goal in GOALS:
            print(verdict(own, agreement, goal), flush=True)
    # A token of each full model, by which the rest of the time is spent.
    token_seconds = sum(1 / own[0].tokens_per_second for own in by_curve(points).values())
    pairs = replace(most, thresholds=(0.0,) * (drafted - 1))
    part = pairs.within(seconds - (time.monotonic() - start), token_seconds / len(curves))
    drafts: dict[str, list[Speculation]] = {}
    for name, engine in engines.items():
        found = measure_speculation(engine, ways[name], prompts[: part.prompts], part.tokens)
        drafts[name] = found
        print(f"\nself-speculative decoding, {name}\n{speculation_table(found)}")
        best = max(found, key=lambda one: one.speedup)
        print(f"fastest: drafts of {best.drafter} ({_against(best.speedup, LEAST_LOSSLESS)})")
        if any(one.identical < 1 for one in found):
            # Rounding may decide between two equally probable tokens.
            print("   a text differs: two tokens were equally probable, or this is a bug to report")
    save(tradeoff_curve(points, GOALS[0][0]), work_dir / "tradeoff.png")
    figures = {
        "thresholds": [asdict(point) for point in points],
        "self_speculative": {name: [asdict(one) for one in own] for name, own in drafts.items()},
    }
    (work_dir / "tradeoff.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nPicture: {work_dir}/tradeoff.png")


def verdict(points: list[Point], least_agreement: float, goal: float) -> str:
    """The fastest of a curve's points that agrees with the full model so often."""
    best = fastest(points, least_agreement)
    where = "the full model" if best.threshold is None else f"threshold {best.threshold}"
    return (
        f"{best.curve}, at least {least_agreement:.0%} agreement: {where}, {best.speedup:.2f} "
        f"times the full model's speed, {best.agreement:.1%}, perplexity {best.perplexity:.2f} "
        f"({_against(best.speedup, goal)})"
    )


def _against(found: float, goal: float) -> str:
    return f"{'reaches' if found >= goal else 'MISSES'} the goal of {goal:.1f}"
