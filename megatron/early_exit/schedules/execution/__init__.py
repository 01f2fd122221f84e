"""Runs schedules: one rank's list of actions, on Megatron's own passes and messages."""
