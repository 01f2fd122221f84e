"""Times schedules on cost models."""
