"""What a training step is made of: data, schedules, fills, the log."""
