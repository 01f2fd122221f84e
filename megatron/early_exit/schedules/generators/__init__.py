"""Generators of schedules: each makes the lists and promises the memory they need."""

from megatron.early_exit.schedules.generators.base import Generator
from megatron.early_exit.schedules.generators.bubble_filling import FilledOneFOneB, max_fills
from megatron.early_exit.schedules.generators.interleaved import Interleaved
from megatron.early_exit.schedules.generators.one_f_one_b import OneFOneB
from megatron.early_exit.schedules.generators.tuning import Tuning
from megatron.early_exit.schedules.generators.zero_bubble import ZeroBubbleH1

__all__ = [
    "FilledOneFOneB",
    "Generator",
    "Interleaved",
    "OneFOneB",
    "Tuning",
    "ZeroBubbleH1",
    "max_fills",
]
