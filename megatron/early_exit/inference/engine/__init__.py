"""Requests, how their tokens are chosen, and which of them run through what segment when."""
