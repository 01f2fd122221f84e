"""Tests: unit/ starts no processes, distributed/ starts gloo ranks, functional/ command lines."""
