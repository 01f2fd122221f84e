"""Early-exit inference: `EarlyExitEngine` over a checkpoint, `SamplingParams` in, results out."""

from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.inference.decoding.results import (
    GeneratedToken,
    GenerationResult,
    GenerationStatistics,
)
from megatron.early_exit.inference.engine import EarlyExitEngine

__all__ = [
    "EarlyExitEngine",
    "GeneratedToken",
    "GenerationResult",
    "GenerationStatistics",
    "SamplingParams",
]
