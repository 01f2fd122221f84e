"""Checkpoints of the original EE-LLM (arXiv 2312.04916), a fork of the Megatron-LM of 2023."""

from megatron.early_exit.checkpoint.ee_llm.importing import import_ee_llm

__all__ = ["import_ee_llm"]
