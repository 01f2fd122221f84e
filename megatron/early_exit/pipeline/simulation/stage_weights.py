"""How many weights a stage holds, and which of them it shares with others."""

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.simulation.layout import Layout
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape


def stage_weights(shape: ModelShape, layout: Layout, exits: EarlyExitConfig, stage: int) -> float:
    """Weights of a stage, on each accelerator of its tensor-parallel group."""
    num_exits = layout.exit_stages(exits).count(stage)
    branch = shape.mlp_weights * exits.use_exit_mlp + shape.layer_weights * exits.use_exit_block
    weights = layout.layers_per_stage[stage] * shape.layer_weights + num_exits * branch
    projections = int(_has_embedding(shape, layout, exits, stage))
    projections += int(stage == layout.num_stages - 1 and not shape.tied_embedding)
    projections += num_exits * exits.untie_exit_output_weights
    return (weights + projections * shape.projection_weights) / layout.tensor_parallel


def embedding_stages(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> tuple[int, ...]:
    """The stages that hold the embedding, or a copy that is tied to it."""
    stages = range(layout.num_stages)
    return tuple(stage for stage in stages if _has_embedding(shape, layout, exits, stage))


def _has_embedding(shape: ModelShape, layout: Layout, exits: EarlyExitConfig, stage: int) -> bool:
    # Whatever is tied to the embedding shares one copy on the stage.
    ties_exits = stage in layout.exit_stages(exits) and not exits.untie_exit_output_weights
    ties_head = stage == layout.num_stages - 1 and shape.tied_embedding
    return stage == 0 or ties_exits or ties_head
