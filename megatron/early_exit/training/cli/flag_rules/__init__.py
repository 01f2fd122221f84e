"""Flags of Megatron that do nothing here, and are refused instead of being taken silently."""
