"""Where in a pipeline the exits are."""

from argparse import Namespace

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.training.arguments import core_transformer_config_from_args

from megatron.early_exit.config import EarlyExitConfig


def exit_stages(args: Namespace, exits: EarlyExitConfig) -> frozenset[int]:
    """The pipeline stages that exits lie on, by checked arguments without chunks."""
    config = core_transformer_config_from_args(args)
    layout = config.pipeline_model_parallel_layout
    stages = range(args.pipeline_model_parallel_size)
    if layout is None:
        layers = [get_num_layers_to_build(config, pp_rank=stage) for stage in stages]
    else:
        layers = [layout.layout[stage][0].count(LayerType.decoder) for stage in stages]
    return frozenset(exits.stages(layers))
