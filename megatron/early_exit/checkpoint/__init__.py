"""Saved models: their description, and how to read them without Megatron's training code."""
