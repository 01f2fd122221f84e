"""Megatron's log of losses, in training and evaluation.

Megatron logs what its last pipeline stage reports, and has no place where another stage could add
to that. Its training loop looks the three functions up by name."""

from __future__ import annotations

from megatron.training import training

from megatron.early_exit.patches.replace import Wrapper, wrap


def wrap_training_log(log: Wrapper) -> None:
    """Wrap the function that logs an iteration.

    Args:
        log: given Megatron's function.

    Raises:
        RuntimeError: the installed Megatron has another function.
    """
    parameters = "loss_dict, total_loss_dict, learning_rate, iteration, ..."
    wrap(training, "training_log", log, parameters)


def wrap_evaluation(evaluate: Wrapper, evaluate_and_print_results: Wrapper) -> None:
    """Wrap the functions that evaluate on a data set, and that log the results.

    Args:
        evaluate: given the function that returns the means of the losses.
        evaluate_and_print_results: given the function that calls it and logs them.

    Raises:
        RuntimeError: the installed Megatron has other functions.
    """
    parameters = "forward_step_func, data_iterator, model, ..."
    wrap(training, "evaluate", evaluate, parameters)
    parameters = (
        "prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, "
        "config, verbose, write_to_tensorboard, ..."
    )
    wrap(training, "evaluate_and_print_results", evaluate_and_print_results, parameters)
