"""How many weights each stage holds, and which of them it shares with others."""

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.simulation.layout import Layout
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape


def stage_weights(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> tuple[float, ...]:
    """Weights of each stage, on each accelerator of its tensor-parallel group."""
    exit_stages = exits.stages(layout.layers_per_stage)
    with_embedding = embedding_stages(shape, layout, exits)
    branch = shape.mlp_weights * exits.use_exit_mlp + shape.layer_weights * exits.use_exit_block
    found = []
    for stage, num_layers in enumerate(layout.layers_per_stage):
        num_exits = exit_stages.count(stage)
        is_last = stage == layout.num_stages - 1
        projections = int(stage in with_embedding)
        projections += is_last and not shape.share_embeddings_and_output_weights
        projections += num_exits * exits.untie_exit_output_weights
        weights = num_layers * shape.layer_weights + num_exits * branch
        weights += projections * shape.projection_weights
        found.append(weights / layout.tensor_parallel)
    return tuple(found)


def embedding_stages(shape: ModelShape, layout: Layout, exits: EarlyExitConfig) -> frozenset[int]:
    """The stages that hold the embedding, or the one copy of it that all share that is tied."""
    stages = {0}
    if not exits.untie_exit_output_weights:
        stages |= set(exits.stages(layout.layers_per_stage))
    if shape.share_embeddings_and_output_weights:
        stages.add(layout.num_stages - 1)
    return frozenset(stages)
