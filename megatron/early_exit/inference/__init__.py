"""Early-exit inference: `EarlyExitEngine` over a checkpoint, `SamplingParams` in, results out."""

from megatron.early_exit.inference.early_exit_engine import EarlyExitEngine
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import (
    GeneratedToken,
    GenerationResult,
    GenerationStatistics,
)

__all__ = [
    "EarlyExitEngine",
    "GeneratedToken",
    "GenerationResult",
    "GenerationStatistics",
    "SamplingParams",
]
