"""The weights of the exits' losses over the course of training (EE-LLM, arXiv 2312.04916)."""

import math

from megatron.early_exit.config import EarlyExitConfig


def exit_loss_weights(config: EarlyExitConfig, iteration: int) -> dict[int, float]:
    """Weight of each exit's loss by position, after so many completed iterations: it moves from its
    initial to its final value over the warm-up iterations, up or down."""
    progress = 1.0
    if config.exit_layer_weight_warmup_iters > 0:
        progress = min(1.0, iteration / config.exit_layer_weight_warmup_iters)
    if config.exit_layer_weight_warmup_style == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return {
        one.position: one.weight_init + (one.weight - one.weight_init) * progress
        for one in config.exits
    }
