"""The processes of `pipeline_schedules.py`: one for each stage, which time steps and parts."""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from schedule_cases import CASES, EXIT, STAGES, Case

from megatron.early_exit import platform
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.layer_profile import Part, Pass
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.schedule import Schedule

# Of each part, in each turn of the steps.
PROFILED_TURNS = 4
Seconds = dict[Part, dict[Pass, float]]
OPTIONS = {"transformer_impl": "local", "masked_softmax_fusion": False, "persist_layer_norm": False}


class Stage:
    """This rank's chunk of a model, and its training steps."""

    def __init__(self, options: argparse.Namespace, exits: EarlyExitConfig, layers: int) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import unwrap_model

        from megatron.early_exit.training.loop.data import BatchReader
        from megatron.early_exit.training.loop.step import ForwardStep, LossChecks
        from megatron.early_exit.training.loop.training_schedule import ScheduledSteps
        from megatron.early_exit.training.loss.exit_loss import ExitObjective, LossNormalization
        from megatron.early_exit.training.part_profile import llama_config

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
        """Seconds of a step with a schedule, or with Megatron's own for this many microbatches."""
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
        )
        torch.cuda.synchronize()
        torch.distributed.barrier()
        return time.perf_counter() - begun


class _Plan:
    schedule: Schedule
    clock: PassClock | None = None

    def __call__(self, num_microbatches: int) -> Schedule:
        del num_microbatches
        return self.schedule


def model_shape(options: argparse.Namespace, num_layers: int) -> ModelShape:
    """A Llama-like model."""
    return ModelShape.llama(
        num_layers=num_layers,
        hidden_size=options.hidden,
        ffn_hidden_size=4 * options.hidden,
        num_attention_heads=options.heads,
        num_query_groups=options.heads,
        vocab_size=options.vocab,
        seq_length=options.seq_length,
    )


def random_batches(options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of random tokens."""
    shape = options.micro_batch_size, options.seq_length
    while True:
        yield {
            "tokens": torch.randint(options.vocab, shape),
            "labels": torch.randint(options.vocab, shape),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(options.seq_length).expand(shape),
        }


def measure(rank: int, options: argparse.Namespace, port: int, answers: Any) -> None:
    """Profile and time alternately, on each rank; rank 0 returns the results of all ranks."""
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

    def together(part: Part, size: int) -> None:
        torch.distributed.barrier()

    times: dict[Case, list[float]] = {case: [] for case in CASES}
    profiles: list[Seconds] = []
    for turn in range(options.rounds):
        size = options.micro_batch_size
        found = profiler.measure([size], PROFILED_TURNS, together)
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
    """Seconds of sending a hidden state from one stage to the other."""
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
