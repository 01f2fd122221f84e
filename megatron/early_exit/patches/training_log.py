"""Extends Megatron's log of losses, in training and evaluation.

Megatron logs what its last pipeline stage reports, and other stages have no way to add to that. Its
training loop looks up the three functions by name."""

from megatron.training import training

from megatron.early_exit.patches.replace import Wrapper, wrap


def wrap_log(training_log: Wrapper, evaluate: Wrapper, evaluate_and_print: Wrapper) -> None:
    """Wrap the functions that log an iteration, evaluate a data set, and log the evaluation."""
    losses = "loss_dict, total_loss_dict, learning_rate, iteration, ..."
    wrap(training, "training_log", training_log, losses)
    wrap(training, "evaluate", evaluate, "forward_step_func, data_iterator, model, ...")
    results = (
        "prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, "
        "config, verbose, write_to_tensorboard, ..."
    )
    wrap(training, "evaluate_and_print_results", evaluate_and_print, results)
