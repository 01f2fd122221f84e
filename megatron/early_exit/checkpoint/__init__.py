"""What a saved model is made of, and how to read it without Megatron's training code."""
