"""The protocol of the servers of Megatron and of EE-LLM (arXiv 2312.04916)."""
