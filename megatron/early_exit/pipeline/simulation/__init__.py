"""Times schedules on cost models, and draws them."""

from megatron.early_exit.pipeline.simulation.costs import CostModel, StageCost
from megatron.early_exit.pipeline.simulation.simulator import simulate
from megatron.early_exit.pipeline.simulation.timeline import TimedAction, Timeline

__all__ = ["CostModel", "StageCost", "TimedAction", "Timeline", "simulate"]
