"""The exits' losses, accuracies and weights in Megatron's log, and a line of progress.

Megatron logs what its last pipeline stage reports, and has no place where another stage could add
to that. `log_exits` is the one patch of the training loop: it wraps `training_log`, `evaluate` and
`evaluate_and_print_results`, which the loop looks up by name, so that the dictionaries of losses
they handle hold the exits' too. The console, TensorBoard and W&B then follow.
"""

import inspect
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training
from megatron.training.utils import print_rank_last

from megatron.early_exit.training.exit_loss import ExitObjective
from megatron.early_exit.training.metrics import ExitMetrics

_EXPECTED_PARAMETERS = {
    "training_log": ["loss_dict", "total_loss_dict", "learning_rate", "iteration"],
    "evaluate": ["forward_step_func", "data_iterator", "model"],
    "evaluate_and_print_results": [
        *("prefix", "forward_step_func", "data_iterator", "model", "iteration"),
        *("process_non_loss_data_func", "config", "verbose", "write_to_tensorboard"),
    ],
}


def log_exits(objective: ExitObjective, progress: "Progress") -> None:
    """Add the exits' measurements to what `megatron.training` logs from now on.

    Raises:
        RuntimeError: the installed megatron-core does not have the functions this relies on.
    """
    for name, parameters in _EXPECTED_PARAMETERS.items():
        function = getattr(training, name, None)
        found = list(inspect.signature(function).parameters) if function else None
        if found is None or found[: len(parameters)] != parameters:
            raise RuntimeError(
                f"megatron.training.training.{name} has changed (parameters {found}), this version "
                "of megatron-core is not supported"
            )
    training.training_log = _with_exits(training.training_log, objective, progress)
    evaluation = _Evaluation(objective)
    training.evaluate = evaluation.with_losses(training.evaluate)
    training.evaluate_and_print_results = evaluation.with_accuracies(
        training.evaluate_and_print_results
    )


def _device() -> torch.device:
    return torch.empty(0, device="cuda").device


def _means(metrics: ExitMetrics) -> dict[str, torch.Tensor]:
    if not metrics.positions:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["dp_cp", "pp"])
    return metrics.take_means(groups, _device())


def _with_exits(
    training_log: Callable[..., Any], objective: ExitObjective, progress: "Progress"
) -> Callable[..., Any]:
    def log(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        loss_dict = {**loss_dict, **_means(objective.training_metrics)}
        for position, weight in objective.weights.items():
            loss_dict[f"exit {position} weight"] = torch.tensor(weight, device=_device())
        result = training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        progress.report(iteration)
        return result

    return log


class _Evaluation:
    """Adds the exits to Megatron's evaluation.

    Losses go the way of the final loss. Accuracies do not, because Megatron takes all that it is
    given for a loss and prints the perplexity of it.
    """

    def __init__(self, objective: ExitObjective) -> None:
        self.objective = objective
        self._accuracies: list[dict[str, float]] = []

    def with_losses(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate`, which returns the means over one data set, with the exits' among them."""

        def run(*args: Any, **kwargs: Any) -> Any:
            losses, collected, time_is_up = evaluate(*args, **kwargs)
            means = _means(self.objective.validation_metrics)
            if not time_is_up:
                accuracies = {name: value for name, value in means.items() if "accuracy" in name}
                self._accuracies.append({name: value.item() for name, value in accuracies.items()})
                losses.update({name: means[name] for name in means if name not in accuracies})
            return losses, collected, time_is_up

        return run

    def with_accuracies(self, evaluate_and_print: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate_and_print_results`, which logs the means over one or several data sets."""
        signature = inspect.signature(evaluate_and_print)

        def run(*args: Any, **kwargs: Any) -> None:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            self._accuracies.clear()
            evaluate_and_print(*args, **kwargs)
            for suffix, accuracies in zip(_validation_suffixes(), self._accuracies, strict=False):
                self._log(suffix, accuracies, call.arguments)

        return run

    def _log(self, suffix: str, accuracies: dict[str, float], call: dict[str, Any]) -> None:
        if not accuracies:
            return
        texts = (f"{name}: {value:.4f}" for name, value in accuracies.items())
        print_rank_last(f" validation{suffix} at {call['prefix']} | " + " | ".join(texts))
        writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
        if writer is None or not call["write_to_tensorboard"]:
            return
        for name, value in accuracies.items():
            writer.add_scalar(f"{name} validation{suffix}", value, call["iteration"])
            if wandb_writer:
                wandb_writer.log({f"{name} validation{suffix}": value}, call["iteration"])


def _validation_suffixes() -> list[str]:
    """What Megatron adds to the names of figures, for each validation set."""
    args = get_args()
    if not args.multiple_validation_sets:
        return [""]
    names = args.validation_set_names or range(len(args.eval_iters))
    return [f"-{name}" for name in names]


class Progress:
    """Prints how far the run is, how fast it goes, and when it will be done.

    Args:
        iterations: iterations of the whole run.
        interval: iterations between lines.
        tokens_per_iteration: current number of tokens in a global batch.
    """

    def __init__(
        self, iterations: int, interval: int, tokens_per_iteration: Callable[[], int]
    ) -> None:
        self.iterations = iterations
        self.interval = interval
        self.tokens_per_iteration = tokens_per_iteration
        self._last: tuple[int, float] | None = None

    def report(self, iteration: int) -> None:
        """Called after each iteration; prints every `interval` of them, on the last rank."""
        now = time.monotonic()
        if self._last is None:
            # The first iteration pays for allocations and compilation: measure from its end.
            self._last = (iteration, now)
            return
        if iteration % self.interval != 0:
            return
        steps, seconds = iteration - self._last[0], now - self._last[1]
        self._last = (iteration, now)
        if steps <= 0:
            return
        left = timedelta(seconds=round((self.iterations - iteration) * seconds / steps))
        tokens = steps * self.tokens_per_iteration() / seconds
        share = iteration / self.iterations
        print_rank_last(
            f" progress: {share:4.0%} ({iteration}/{self.iterations}) | "
            f"{tokens:,.0f} tokens/s | time left {left}"
        )
