"""The flags of tools/plan_pipeline.py, and its output."""
