"""How Megatron's training loop tunes exits: with forward passes, and learning rates of their own.

Pipeline stages exchange hidden states only, so a training step is one of Megatron's own
forward-only schedules, which make the exits' gradients, and what finishes those after it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey
from megatron.core.utils import get_model_config
from megatron.training import training
from torch import Tensor

from megatron.early_exit.training.exit_loss import ExitObjective

_SCHEDULE_PARAMETERS = ("schedule_pg_collection",)


def forward_only_training(objective: ExitObjective, count_tokens: Callable[[], Tensor]) -> None:
    """Make Megatron train with forward passes from now on; the one patch of its schedules.

    Args:
        objective: of the exits, which make the gradients in those passes.
        count_tokens: the number of tokens in the microbatches since the last call.

    Raises:
        RuntimeError: the installed megatron-core does not have the function this relies on.
    """
    get_schedule = getattr(training, "get_forward_backward_func", None)
    found = tuple(inspect.signature(get_schedule).parameters) if get_schedule else ()
    if get_schedule is None or not set(_SCHEDULE_PARAMETERS) <= set(found):
        raise RuntimeError(
            f"megatron.training.training.get_forward_backward_func has changed (parameters "
            f"{found}), this version of megatron-core is not supported"
        )

    def get(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(_forward_and_finish, get_schedule(*args, **kwargs), objective, count_tokens)

    training.get_forward_backward_func = get


def _forward_and_finish(
    schedule: Callable[..., Any],
    objective: ExitObjective,
    count_tokens: Callable[[], Tensor],
    *,
    forward_only: bool = False,
    **kwargs: Any,
) -> Any:
    """What a schedule of Megatron's is called for."""
    if forward_only:
        return schedule(forward_only=True, **kwargs)
    model, num_microbatches = kwargs["model"], kwargs["num_microbatches"]
    config = get_model_config(model[0])
    scale = torch.ones(1, device=torch.cuda.current_device())
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    per_token = config.calculate_per_token_loss
    # Megatron says it after each forward step, which is when a backward step would follow.
    shares = objective.normalization.context_parallel_size / num_microbatches
    objective.set_loss_scale(scale if per_token else scale * shares)
    reports = schedule(forward_only=True, **kwargs)
    config.finalize_model_grads_func(
        model, count_tokens() if per_token else None, force_all_reduce=kwargs["force_all_reduce"]
    )
    return reports


def exit_learning_rates(rates: dict[int, float]) -> None:
    """Give exits learning rates of their own; the one patch of Megatron's parameter groups.

    Args:
        rates: the largest learning rate by the exit's position.

    Raises:
        RuntimeError: the installed megatron-core does not have the function this relies on.
    """
    original = getattr(training, "get_megatron_optimizer_config", None)
    if original is None:
        raise RuntimeError(
            "megatron.training.training.get_megatron_optimizer_config has gone, this version of "
            "megatron-core is not supported"
        )

    def with_rates(args: Any) -> tuple[OptimizerConfig, dict[ParamKey, ParamGroupOverride]]:
        config, overrides = original(args)
        for position, rate in rates.items():
            if rate == args.lr:
                # Megatron tells groups of parameters apart by their rates when it loads.
                continue
            own = ParamGroupOverride(max_lr=rate, min_lr=(args.min_lr or 0.0) * rate / args.lr)
            overrides[ParamKey(name=f"*exits.{position}.*")] = own
        return config, overrides

    training.get_megatron_optimizer_config = with_rates  # type: ignore[assignment]
