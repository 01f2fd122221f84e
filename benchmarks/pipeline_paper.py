"""Simulate what exits cost in the EE-LLM paper's setting: four models on 64 A100s.

    python benchmarks/pipeline_paper.py [--json FILE]

The first table shows the cost relative to the standard model with each optimisation of the exits on
    and off: deferral to the backward phase, chunks of logits, and placement before the next stage's
    first layer. The second shows what filling bubbles costs at 2 to 16 stages, and in the four
    models. The command fails if, with neighbouring stages on one node, exits cost more than 2 % of
    the step or any peak memory, or if fills cost more than 1 %."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from figures import FigureTable, add_json_flag

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.costs.model_costs import ExitExecution
from megatron.early_exit.planner.paper import PAPER_MODELS, PaperModel
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.schedules.check import build_proved
from megatron.early_exit.schedules.generators import FilledOneFOneB, OneFOneB

CHUNK_TOKENS = 1024
TIME_BOUND, MEMORY_BOUND, FILLS_BOUND = 1.02, 1.0, 1.01


@dataclass(frozen=True)
class Variant:
    """Which optimisations are on."""

    deferral: bool
    chunks: bool
    placement: bool

    @property
    def execution(self) -> ExitExecution:
        """How losses of exits are computed."""
        return ExitExecution(
            deferred=self.deferral, chunk_tokens=CHUNK_TOKENS if self.chunks else None
        )


# Chunks are of what is deferred.
VARIANTS = [
    Variant(deferral, chunks, placement)
    for placement in (False, True)
    for deferral, chunks in ((False, False), (True, False), (True, True))
]
BEST = VARIANTS[-1]


def changes(model: PaperModel, variant: Variant, near: bool = True) -> tuple[float, float]:
    """Relative increase of step time, and of peak memory on the fullest rank, over the standard
    model.

    Args:
        model: a model of the paper.
        variant: how its exits are computed.
        near: neighbouring stages are on one node (--use-tp-pp-dp-mapping) where they can be.
    """
    exits = model.model.exits.placed(variant.placement)
    step = model.step(exits, variant.execution, near)
    standard = model.step(EarlyExitConfig(), ExitExecution(), near)
    time = step.step_s / standard.step_s - 1
    return time, max(step.peak_bytes) / max(standard.peak_bytes) - 1


def fill_cost(num_ranks: int, num_microbatches: int) -> float:
    """Relative increase of the step time by all fills that fit, with equal stages, a backward pass
    of two forward passes, and a transfer of a tenth of one."""
    costs = CostModel.even(num_ranks, 1.0, 2.0, transfer_s=0.1)
    plain = OneFOneB(num_ranks=num_ranks, num_microbatches=num_microbatches)
    filled = FilledOneFOneB(
        num_ranks=num_ranks, num_microbatches=num_microbatches, backward_forward_ratio=2.0
    )
    times = (simulate(build_proved(one), costs).step_s for one in (filled, plain))
    return next(times) / next(times) - 1


def model_fill_cost(model: PaperModel) -> float:
    """The same for a model of the paper, with its exits placed by --pre-exit and deferred."""
    exits = model.model.exits.placed(BEST.placement)
    filled, plain = (
        model.step(exits, BEST.execution, fill_bubbles=filling).step_s for filling in (True, False)
    )
    return filled / plain - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    print(f"Exits over the standard model, {', '.join(PAPER_MODELS)}: step time, peak memory\n")
    print("deferral  chunks  placement" + "".join(f"{name:>18}" for name in PAPER_MODELS))
    for variant in VARIANTS:
        switches = (variant.deferral, variant.chunks, variant.placement)
        marks = [("on" if switch else "-").ljust(8) for switch in switches]
        cells = [_cell(*changes(model, variant)) for model in PAPER_MODELS.values()]
        print(f"{marks[0]}  {marks[1]}{marks[2]} " + "".join(cells))
    far = [_cell(*changes(model, BEST, near=False)) for model in PAPER_MODELS.values()]
    print(f"{'the same, default mapping':27}" + "".join(far))
    best = [changes(model, BEST) for model in PAPER_MODELS.values()]
    time, memory = (max(values) for values in zip(*best, strict=True))
    fills = {ranks: fill_cost(ranks, ranks) for ranks in range(2, 17)}
    print("\nAll fills that have room, r = 2, as many microbatches as stages: cost of the step")
    print("  ".join(f"P={ranks} {cost:.2%}" for ranks, cost in fills.items()))
    print("  ".join(f"{n} {model_fill_cost(model):.2%}" for n, model in PAPER_MODELS.items()))
    print()
    table = FigureTable()
    table.add("step with exits over standard, at most", 1 + time, TIME_BOUND, better="lower")
    table.add("peak memory with exits over standard", 1 + memory, MEMORY_BOUND, better="lower")
    most = 1 + max(fills.values())
    table.add("step with fills over none, at most", most, FILLS_BOUND, better="lower")
    return table.finish(args.json)


def _cell(time: float, memory: float) -> str:
    return f"{time:+.1%}, {memory:+.1%}".rjust(18)


if __name__ == "__main__":
    sys.exit(main())
