"""Learning rates of their own for the exits that are tuned."""

from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey
from megatron.training import training


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
