"""Turns text into tokens: JSON lines, Megatron's tokenizers, and Megatron's indexed datasets."""
