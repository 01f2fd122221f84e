"""Pipeline schedules as data: generated, proved, and run in training."""
