"""The sections of `tools/gpu_check.py`, one file each, and what they share."""
