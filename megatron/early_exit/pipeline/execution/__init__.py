"""Runs schedules: one rank's list of actions, on Megatron's own passes and messages."""

from megatron.early_exit.pipeline.execution.executor import Executor

__all__ = ["Executor"]
