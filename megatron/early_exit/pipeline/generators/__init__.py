"""Generators of schedules: each makes the lists and promises the memory they need."""

from megatron.early_exit.pipeline.generators.base import Generator
from megatron.early_exit.pipeline.generators.bubble_filling import FilledOneFOneB, max_fills
from megatron.early_exit.pipeline.generators.interleaved import Interleaved
from megatron.early_exit.pipeline.generators.one_f_one_b import OneFOneB
from megatron.early_exit.pipeline.generators.tuning import Tuning
from megatron.early_exit.pipeline.generators.zero_bubble import ZeroBubbleH1

__all__ = [
    "FilledOneFOneB",
    "Generator",
    "Interleaved",
    "OneFOneB",
    "Tuning",
    "ZeroBubbleH1",
    "max_fills",
]
