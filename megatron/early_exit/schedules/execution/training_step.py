"""Runs one training step by a schedule, which is what Megatron calls its own schedules for."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import (
    clear_embedding_activation_buffer,
    finish_embedding_wgrad_compute,
    get_tensor_shapes,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron.early_exit.schedules.execution.contributions import Contributions
from megatron.early_exit.schedules.execution.executor import Executor
from megatron.early_exit.schedules.execution.messages import Messages
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.execution.passes import Passes, Workload
from megatron.early_exit.schedules.schedule import Schedule


def run_training_step(
    schedule: Schedule,
    contributions: Contributions,
    workload: Workload,
    *,
    forward_step_func: Callable[..., Any],
    data: Iterator[Any],
    model: torch.nn.Module,
    seq_length: int,
    micro_batch_size: int,
    force_all_reduce: bool,
    clock: PassClock | None = None,
) -> list[Any]:
    """Run this rank's list, and finish the gradients as Megatron's schedules do.

    Args:
        schedule: with sends and receives, one stage on each rank.
        contributions: of its microbatches.
        workload: told of each microbatch.
        forward_step_func: as Megatron's schedules take it.
        data: what it reads from.
        model: this rank's chunk.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a microbatch.
        force_all_reduce: of the gradients, also where optimizer states are sharded.
        clock: times the passes.

    Returns:
        What the last stage's forwards reported, empty on the others.
    """
    config = get_model_config(model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stage = groups.pp.rank()
    shapes = get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=None,  # type: ignore[arg-type]
        config=config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    passes = Passes(
        forward_step_func=forward_step_func,
        data=data,
        model=model,
        config=config,
        workload=workload,
        contributing=contributions.to_losses(stage),
        gradient_factor=contributions.gradient_factor(stage),
        context_parallel_size=groups.cp.size(),
        is_first_stage=stage == 0,
        is_last_stage=stage == groups.pp.size() - 1,
        shape=tuple(shapes[0]),
        clock=clock,
    )
    embedding = clear_embedding_activation_buffer(config, model, passes.is_last_stage)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    Executor(schedule.ranks[stage], passes, Messages(groups.pp, config, shapes[0])).run()
    finish_embedding_wgrad_compute(config, embedding, passes.is_last_stage, groups.tp)
    if config.finalize_model_grads_func is not None:
        num_tokens = passes.num_tokens if config.calculate_per_token_loss else None
        config.finalize_model_grads_func(
            [model], num_tokens, pg_collection=groups, force_all_reduce=force_all_reduce
        )
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return passes.reports
