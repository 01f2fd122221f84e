"""The same exits after their layers, or before the ones behind (--pre-exit)."""

from dataclasses import replace

from megatron.early_exit.config import EarlyExitConfig


def placed(exits: EarlyExitConfig, pre_exit: bool) -> EarlyExitConfig:
    """The same exits with the placement that is given; they stand before or after layers.

    Raises:
        ValueError: their MLPs need them after their layers.
    """
    shift = int(pre_exit) - int(exits.pre_exit)
    numbers = tuple(number + shift for number in exits.exit_layer_nums)
    return replace(exits, exit_layer_nums=numbers, pre_exit=pre_exit)


def placements(exits: EarlyExitConfig, num_layers: int) -> tuple[EarlyExitConfig, ...]:
    """The placements that exits can have: an MLP takes the place of that of the layer before it,
    and behind the last layer there is none to stand before."""
    after = placed(exits, pre_exit=False)
    if not exits.positions or exits.use_exit_mlp or exits.positions[-1] >= num_layers:
        return (after,)
    return after, placed(exits, pre_exit=True)
