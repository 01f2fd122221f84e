"""Text to tokens: JSON lines, Megatron's tokenizers, and Megatron's indexed datasets."""
