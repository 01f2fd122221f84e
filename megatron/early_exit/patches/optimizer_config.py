"""Changes Megatron's choice of learning rates: groups of parameters get their own rates.

Megatron takes the rates only from its flags, which cannot name the parameters of exits."""

from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey
from megatron.training import training

from megatron.early_exit.patches.replace import wrap


def set_learning_rates(rates: dict[str, float]) -> None:
    """Give parameters learning rates of their own.

    Args:
        rates: the largest learning rate by a pattern that the parameters' names match.
    """

    def wrapper(original: Any) -> Any:
        def with_rates(args: Any) -> tuple[OptimizerConfig, dict[ParamKey, ParamGroupOverride]]:
            config, overrides = original(args)
            for pattern, rate in rates.items():
                if rate == args.lr:
                    # Megatron tells groups of parameters apart by their rates when it loads.
                    continue
                own = ParamGroupOverride(max_lr=rate, min_lr=(args.min_lr or 0.0) * rate / args.lr)
                overrides[ParamKey(name=pattern)] = own
            return config, overrides

        return with_rates

    wrap(training, "get_megatron_optimizer_config", wrapper, "args")
