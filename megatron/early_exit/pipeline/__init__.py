"""Pipeline schedules as data: generated, proved, timed on a cost model, and drawn."""
