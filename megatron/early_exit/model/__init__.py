"""The early-exit GPT: its layers, exit heads and builder."""
