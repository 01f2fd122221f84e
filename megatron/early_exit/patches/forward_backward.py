"""Replaces Megatron's choice of a pipeline schedule, which is limited to its own schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.training import training

from megatron.early_exit.patches.replace import wrap


def train_by(step: Callable[..., list[Any]]) -> None:
    """Make Megatron train with `step` from now on. Evaluation still uses Megatron's own schedules.

    Args:
        step: called with the arguments that Megatron passes to its schedules, except
            `forward_only`.
    """

    def wrapper(get_schedule: Callable[..., Any]) -> Callable[..., Any]:
        def get(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(_train_or_evaluate, step, get_schedule(*args, **kwargs))

        return get

    parameters = "pp_size, vp_size, schedule_pg_collection, ..."
    wrap(training, "get_forward_backward_func", wrapper, parameters)


def _train_or_evaluate(
    step: Callable[..., list[Any]],
    evaluate: Callable[..., list[Any]],
    *,
    forward_only: bool = False,
    **kwargs: Any,
) -> list[Any]:
    return evaluate(forward_only=True, **kwargs) if forward_only else step(**kwargs)
