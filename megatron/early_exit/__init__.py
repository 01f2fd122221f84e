"""Training and inference of early-exit language models on unmodified Megatron."""
