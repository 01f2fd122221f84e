"""Measure the time of pipeline schedules, and compare it with the simulator's prediction.

    python benchmarks/pipeline_schedules.py [--layers 4] [--rounds 3] ...

Two stages, each a process with one thread (or a GPU of its own), run training steps by lists of
passes: 1F1B without exits, which Megatron's own schedule runs as well; 1F1B with an exit at the end
    of the first stage; with the same exit moved to the second stage by --pre-exit; and with a fill
    in the bubble of the warm-up, of the cool-down, and of both. The simulator gets the times that
    tools/profile_layers.py measures for a layer, the embedding, the head and an exit, here in both
    processes at once, because they share the memory bandwidth; it gets no times of whole stages.
    All cases are measured alternately, so that noise affects all of them; figures are medians. A
    step consists of forward passes, backward passes and messages, without the optimizer.
    Predictions may differ from measurements by 10 %: a figure is the larger of both over the other.
"""

import argparse
import socket
import sys

import torch
from figures import FigureTable, add_json_flag
from schedule_cases import STAGES, Case
from schedule_ranks import Seconds, measure

from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.layer_profile import Part
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.process_family import run_program

BOUND = 1.10


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="layers of each stage")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8, help="full microbatches of a step")
    parser.add_argument(
        "--rounds", type=int, default=7, help="runs of each case, of which the first is not timed"
    )
    add_json_flag(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds} is out of range, allowed: 2 or more")
    return args


def predicted_costs(
    case: Case, profile: list[Seconds], layers: int, transfer_s: float
) -> CostModel:
    """The costs of the stages of a case, summed over their parts."""
    stages = []
    for stage, seconds in enumerate(profile):
        parts: list[Part] = ["head" if stage else "embedding"]
        parts += ["layer"] * layers
        if case.exit_at_boundary and stage == int(case.pre_exit):
            parts.append("exit")
        forward_s, backward_s = (
            sum(seconds[part][name] for part in parts) for name in ("forward", "backward")
        )
        stages.append(StageCost(forward_s=forward_s, backward_s=backward_s))
    return CostModel(stages=tuple(stages), transfer_s=(transfer_s,))


def main() -> int:
    """Measure and print; returns the exit status, 1 where the simulator is too far off."""
    options = parse()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = torch.multiprocessing.spawn(
        measure, (options, port, answers), nprocs=STAGES, join=False
    )
    while answers.empty() and not ranks.join(timeout=0.2):
        pass
    times, profile, transfer_s = answers.get()
    while not ranks.join():
        pass
    print(
        f"{STAGES} stages of {options.layers} layers, hidden {options.hidden}, vocabulary "
        f"{options.vocab}, {options.microbatches} microbatches of {options.micro_batch_size} x "
        f"{options.seq_length} tokens; a transfer takes {1000 * transfer_s:.2f} ms"
    )
    print(
        f"{'':30} {'measured':>10} {'simulated':>10} {'apart':>7} {'over 1F1B':>10} "
        f"{'simulated':>10}"
    )
    table = FigureTable(layers=options.layers, hidden=options.hidden)
    base, errors = None, {}
    for case, seconds in times.items():
        costs = predicted_costs(case, profile, options.layers, transfer_s)
        predicted = simulate(case.schedule(options.microbatches), costs).step_s
        base = base or (seconds, predicted)
        apart = predicted / seconds - 1
        errors[case.name] = max(predicted / seconds, seconds / predicted)
        print(
            f"{case.name:30} {1000 * seconds:7.0f} ms {1000 * predicted:7.0f} ms {apart:+7.1%} "
            f"{seconds / base[0]:10.3f} {predicted / base[1]:10.3f}"
        )
    for name, error in errors.items():
        table.add(
            f"measured or simulated over the other, {name}", error, BOUND, 1.0, better="lower"
        )
    return table.finish(options.json)


if __name__ == "__main__":
    sys.exit(run_program(main))
