"""What pipeline schedules take, beside what the simulator says they take.

    python benchmarks/pipeline_schedules.py [--layers 4] [--rounds 3] ...

Two stages, each a process with one thread (or a GPU of its own), run training steps by lists of
passes: 1F1B without exits, which Megatron's own schedule runs as well, with an exit at the end of
the first stage, with the same exit moved to the second by --pre-exit, and with a microbatch more in
the bubble of the warm-up, of the cool-down, and of both. The simulator is given what
tools/profile_layers.py measures of a layer, of the embedding, of the head and of an exit, here on
both stages at a time, which share the memory's bandwidth; it never sees the stages that are timed.
All take turns, so that noise meets all; figures are medians. A step is forwards, backwards and
messages, without the optimizer. The bound is 10 % between the two.
"""

import argparse
import logging
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatron.early_exit import platform
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.communication import with_communication
from megatron.early_exit.pipeline.generators import FilledOneFOneB
from megatron.early_exit.pipeline.schedule import Schedule
from megatron.early_exit.pipeline.simulation import CostModel, StageCost, simulate
from megatron.early_exit.pipeline.simulation.layer_profile import Part, Pass
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape

STAGES, BOUND = 2, 0.10
# Of each part, in each turn of the steps.
PROFILED_TURNS = 4


@dataclass(frozen=True)
class Case:
    """A model on two stages, and the fills of a step."""

    name: str
    exit_at_boundary: bool = False
    pre_exit: bool = False
    fills: tuple[int, int] = (0, 0)
    by_megatron: bool = False

    def exits(self, layers: int) -> EarlyExitConfig:
        """Exits of the model with so many layers on each stage."""
        if not self.exit_at_boundary:
            return EarlyExitConfig()
        return EarlyExitConfig(
            exit_layer_nums=(layers + self.pre_exit,), pre_exit=self.pre_exit, use_exit_norm=True
        )

    def schedule(self, microbatches: int) -> Schedule:
        """Of a step with so many full microbatches."""
        generator = FilledOneFOneB(
            num_ranks=STAGES,
            num_microbatches=microbatches,
            backward_forward_ratio=2.0,
            num_warmup_fills=self.fills[0],
            num_cooldown_fills=self.fills[1],
            exit_stages=frozenset({int(self.pre_exit)} if self.exit_at_boundary else ()),
        )
        return with_communication(generator.build())


EXIT = Case("exit at the end of stage 1", exit_at_boundary=True)
CASES = (
    Case("1F1B, no exits"),
    Case("the same, Megatron's schedule", by_megatron=True),
    EXIT,
    Case("the same exit by --pre-exit", exit_at_boundary=True, pre_exit=True),
    Case("filled warm-up", exit_at_boundary=True, fills=(1, 0)),
    Case("filled cool-down", exit_at_boundary=True, fills=(0, 1)),
    Case("both filled", exit_at_boundary=True, fills=(1, 1)),
)
Seconds = dict[Part, dict[Pass, float]]
OPTIONS = {"transformer_impl": "local", "masked_softmax_fusion": False, "persist_layer_norm": False}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="of each stage")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8, help="full ones of a step")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, the first not timed")
    return parser.parse_args()


class Stage:
    """This rank's chunk of a model, and the steps it takes."""

    def __init__(self, options: argparse.Namespace, exits: EarlyExitConfig, layers: int) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import unwrap_model

        from megatron.early_exit.training.data import BatchReader
        from megatron.early_exit.training.exit_loss import ExitObjective, LossNormalization
        from megatron.early_exit.training.part_profile import llama_config
        from megatron.early_exit.training.step import ForwardStep, LossChecks
        from megatron.early_exit.training.training_schedule import ScheduledSteps

        groups = ProcessGroupCollection.use_mpu_process_groups()
        divided = OPTIONS | {"pipeline_model_parallel_size": STAGES}
        shape = model_shape(options, layers * STAGES)
        config = llama_config(shape, exits, torch.float32, divided)
        gradients = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        (self._chunk,) = config.get_builder_cls()(config).build_distributed_models(
            groups, gradients, mixed_precision_wrapper=None
        )
        normalization = LossNormalization(per_token=False, context_parallel_size=1)
        unwrap_model(self._chunk).exit_tap = objective = ExitObjective(exits, normalization)
        self._chunk.config.deallocate_pipeline_outputs = True
        self._chunk.config.experimental_attention_variant_loss_scale_func = objective.set_loss_scale
        self._options = options
        reader = BatchReader(
            groups=groups,
            micro_batch_size=options.micro_batch_size,
            eval_micro_batch_size=options.micro_batch_size,
            seq_length=options.seq_length,
        )
        checks = LossChecks(finite=False, spikes=False)
        self._forward_step = ForwardStep(reader, objective, lambda: 0, checks)
        self._plan = _Plan()
        self._steps = ScheduledSteps(objective, self._plan)
        self._data = random_batches(options)

    def step(self, schedule: Schedule | None, microbatches: int) -> float:
        """Seconds of a step by a schedule, or by Megatron's own for so many microbatches."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        run: Any = get_forward_backward_func()
        if schedule is not None:
            self._plan.schedule, run = schedule, self._steps
        self._chunk.zero_grad_buffer()
        torch.distributed.barrier()
        begun = time.perf_counter()
        run(
            forward_step_func=self._forward_step,
            data_iterator=self._data,
            model=[self._chunk],
            num_microbatches=microbatches,
            seq_length=self._options.seq_length,
            micro_batch_size=self._options.micro_batch_size,
            forward_only=False,
        )
        torch.cuda.synchronize()
        torch.distributed.barrier()
        return time.perf_counter() - begun


class _Plan:
    schedule: Schedule
    clock = None

    def __call__(self, num_microbatches: int) -> Schedule:
        del num_microbatches
        return self.schedule


def model_shape(options: argparse.Namespace, num_layers: int) -> ModelShape:
    """A Llama-like model."""
    return ModelShape(
        num_layers=num_layers,
        hidden_size=options.hidden,
        ffn_hidden_size=4 * options.hidden,
        num_attention_heads=options.heads,
        num_query_groups=options.heads,
        vocab_size=options.vocab,
        seq_length=options.seq_length,
    )


def random_batches(options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Tokens drawn by chance, for ever."""
    shape = options.micro_batch_size, options.seq_length
    while True:
        yield {
            "tokens": torch.randint(options.vocab, shape),
            "labels": torch.randint(options.vocab, shape),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(options.seq_length).expand(shape),
        }


def measure(rank: int, options: argparse.Namespace, port: int, answers: Any) -> None:
    """On each rank: profile and time, in turns; rank 0 answers for all."""
    torch.set_num_threads(1)
    machine = platform.prepare()
    # What it says of each chunk hides the turns.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    from megatron.core import parallel_state, tensor_parallel

    from megatron.early_exit.training.part_profile import PartProfiler

    torch.distributed.init_process_group(
        machine.backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=STAGES
    )
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stages = {case: Stage(options, case.exits(options.layers), options.layers) for case in CASES}
    profiler = PartProfiler(
        shape=model_shape(options, 1),
        exits=EXIT.exits(1),
        dtype=torch.float32,
        options=OPTIONS,
    )
    times: dict[Case, list[float]] = {case: [] for case in CASES}
    profiles: list[Seconds] = []
    for turn in range(options.rounds):
        size = options.micro_batch_size
        found = profiler.measure([size], PROFILED_TURNS, lambda *_: torch.distributed.barrier())
        if turn:
            profiles.append(found[size])
        for case, stage in stages.items():
            schedule = None if case.by_megatron else case.schedule(options.microbatches)
            seconds = stage.step(schedule, options.microbatches)
            if turn:
                times[case].append(seconds)
        if rank == 0:
            print(f"turn {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
    own = {
        part: {name: median(one[part][name] for one in profiles) for name in passes}
        for part, passes in profiles[0].items()
    }
    everyone: list[Any] = [None] * STAGES
    torch.distributed.all_gather_object(everyone, own)
    transfer_s = measure_transfer(rank, options)
    if rank == 0:
        answers.put(({case: median(t) for case, t in times.items()}, everyone, transfer_s))
    torch.distributed.barrier()


def measure_transfer(rank: int, options: argparse.Namespace) -> float:
    """Seconds of a hidden state from one stage to the other."""
    shape = options.seq_length, options.micro_batch_size, options.hidden
    hidden = torch.zeros(shape, device="cuda")
    seconds = []
    for _ in range(10):
        torch.distributed.barrier()
        begun = time.perf_counter()
        for sender in range(STAGES):
            if rank == sender:
                torch.distributed.send(hidden, 1 - rank)
            else:
                torch.distributed.recv(hidden, 1 - rank)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / 2)
    return median(seconds)


def predicted_costs(
    case: Case, profile: list[Seconds], layers: int, transfer_s: float
) -> CostModel:
    """The stages of a case, made of their parts."""
    stages = []
    for stage, seconds in enumerate(profile):
        parts: list[Part] = ["layer"] * layers + ["head" if stage else "embedding"]
        if case.exit_at_boundary and stage == int(case.pre_exit):
            parts.append("exit")
        forward_s, backward_s = (
            sum(seconds[part][name] for part in parts) for name in ("forward", "backward")
        )
        stages.append(StageCost(forward_s=forward_s, backward_s=backward_s))
    return CostModel(stages=tuple(stages), transfer_s=(transfer_s,))


def main() -> int:
    """Measure and print; the status is 1 where the simulator is further off than the bound."""
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
    worst = 0.0
    base = None
    for case, seconds in times.items():
        costs = predicted_costs(case, profile, options.layers, transfer_s)
        predicted = simulate(case.schedule(options.microbatches), costs).step_s
        base = base or (seconds, predicted)
        apart = predicted / seconds - 1
        worst = max(worst, abs(apart))
        print(
            f"{case.name:30} {1000 * seconds:7.0f} ms {1000 * predicted:7.0f} ms {apart:+7.1%} "
            f"{seconds / base[0]:10.3f} {predicted / base[1]:10.3f}"
        )
    print(f"furthest apart: {worst:.1%} (bound {BOUND:.0%})")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
