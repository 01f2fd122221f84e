"""The protocol of Megatron's and EE-LLM's servers."""
