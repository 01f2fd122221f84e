"""Finds the layouts that are the fastest of those that fit into memory."""
