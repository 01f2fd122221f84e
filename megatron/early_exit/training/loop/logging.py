"""The exits' losses, accuracies and weights in Megatron's log.

They join the dictionaries of losses that Megatron's functions handle: the console, TensorBoard and
W&B then follow.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_last

from megatron.early_exit.patches.training_log import wrap_log
from megatron.early_exit.training.loop.progress import Progress
from megatron.early_exit.training.loop.step import NUM_ASKED
from megatron.early_exit.training.loss.exit_loss import ExitObjective

_NUM_ITERATIONS = "advanced iterations"
"""What Megatron calls the number of iterations among the totals of an interval."""


def log_exits(objective: ExitObjective, progress: Progress) -> None:
    """Add the exits' measurements to what `megatron.training` logs from now on.

    Raises:
        RuntimeError: the installed megatron-core does not have the functions this relies on.
    """
    log = partial(_with_exits, objective=objective, progress=progress)
    evaluation = _Evaluation(objective)
    wrap_log(log, evaluation.with_losses, evaluation.with_accuracies)


def _device() -> torch.device:
    return torch.empty(0, device="cuda").device


def _means(objective: ExitObjective, training: bool) -> dict[str, torch.Tensor]:
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["dp_cp", "pp"])
    return objective.take_means(groups, _device(), training)


def _with_exits(
    training_log: Callable[..., Any], objective: ExitObjective, progress: Progress
) -> Callable[..., Any]:
    final = _FinalLoss()

    def log(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        loss_dict = final.shown(loss_dict)
        means = _means(objective, training=True)
        _join({**loss_dict, **means}, total_loss_dict)
        loss_dict = {**loss_dict, **means}
        for position, weight in objective.weights.items():
            loss_dict[f"exit {position} weight"] = torch.tensor(weight, device=_device())
        result = training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        progress.report(iteration)
        return result

    return log


def _join(means: dict[str, torch.Tensor], totals: dict[str, Any]) -> None:
    """Let means be averages over an interval of which they have missed the beginning: Megatron
    divides all totals by the iterations of the whole interval."""
    missed = totals.get(_NUM_ITERATIONS, 0)
    for name, mean in means.items():
        if missed and name not in totals:
            totals[name] = mean * missed


class _FinalLoss:
    """The final head's mean loss of each iteration. Where no token was asked for it, since all were
    frozen behind exits, it is what it was, as an exit's is; before there is any, it is left out."""

    def __init__(self) -> None:
        self._last: dict[str, torch.Tensor] = {}

    def shown(self, reports: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the log shows of a step's reports; only the last stage has any."""
        if NUM_ASKED not in reports:
            return reports
        losses = {name: mean for name, mean in reports.items() if name != NUM_ASKED}
        if reports[NUM_ASKED] > 0:
            self._last = losses
        return self._last


class _Evaluation:
    """Adds the exits to Megatron's evaluation.

    Losses go the way of the final loss. Accuracies, and what is measured of gates, do not, because
    Megatron takes all that it is given for a loss and prints the perplexity of it.
    """

    def __init__(self, objective: ExitObjective) -> None:
        self.objective = objective
        self._accuracies: dict[str, float] = {}

    def with_losses(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate`, which returns the means over one data set, with the exits' among them."""

        def run(*args: Any, **kwargs: Any) -> Any:
            losses, collected, time_is_up = evaluate(*args, **kwargs)
            means = _means(self.objective, training=False)
            if not time_is_up:
                for name, mean in means.items():
                    if "accuracy" in name or "gate" in name:
                        self._accuracies[name] = mean.item()
                    else:
                        losses[name] = mean
            return losses, collected, time_is_up

        return run

    def with_accuracies(self, evaluate_and_print: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate_and_print_results`, which logs the means over one data set."""
        signature = inspect.signature(evaluate_and_print)

        def run(*args: Any, **kwargs: Any) -> None:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            self._accuracies = {}
            evaluate_and_print(*args, **kwargs)
            self._log(call.arguments)

        return run

    def _log(self, call: dict[str, Any]) -> None:
        if not self._accuracies:
            return
        texts = (f"{name}: {value:.4f}" for name, value in self._accuracies.items())
        print_rank_last(f" validation at {call['prefix']} | " + " | ".join(texts))
        writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
        if writer is None or not call["write_to_tensorboard"]:
            return
        for name, value in self._accuracies.items():
            writer.add_scalar(f"{name} validation", value, call["iteration"])
            if wandb_writer:
                wandb_writer.log({f"{name} validation": value}, call["iteration"])
