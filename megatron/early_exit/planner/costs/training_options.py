"""What Megatron's flags, other than those of the layout, make of a layer's time and memory."""

from dataclasses import dataclass
from typing import Literal

from megatron.early_exit.ranges import Range

Recompute = Literal["none", "selective", "full"]
"""What is computed again in the backward instead of being kept: nothing, the core of the attention,
or whole layers (Megatron's --recompute-granularity)."""

FP8Format = Literal["hybrid", "e4m3"]
"""Megatron's --fp8-format: gradients with two bits of mantissa or three. They cost the same."""

FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
"""How the scales of FP8 numbers are found (Megatron's --fp8-recipe)."""

_GRADIENT_BYTES = Range(least=2, most=4, is_integer=True)


@dataclass(frozen=True, kw_only=True)
class FP8:
    """Products of the layers in FP8; attention, norms, projections to the vocabulary and exchanges
    stay in bf16.

    Attributes:
        format: Megatron's --fp8-format.
        recipe: Megatron's --fp8-recipe.
        param_gather: weights are kept and gathered in FP8 only (Megatron's --fp8-param-gather).
    """

    format: FP8Format
    recipe: FP8Recipe = "delayed"
    param_gather: bool = False

    @property
    def quantized_bytes(self) -> int:
        """Moved for each entry that is made FP8: it is read, and written in the orders of its two
        products; where all entries have one scale, they are read for that first."""
        return 2 + 1 + 1 + 2 * (self.recipe == "tensorwise")

    @property
    def weight_bytes(self) -> int:
        """Of a weight in both orders, and of that in bf16."""
        return 1 + 1 + (0 if self.param_gather else 2)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a backbone is trained.

    Attributes:
        recompute: what is computed again in the backward.
        flash_attention: keys and values are combined without ever writing the attention matrix
            (arXiv 2205.14135), and what is masked is not computed.
        has_dropout: of the attention matrix, where it is written, and of each layer's two outputs.
        sequence_parallel: tensor-parallel partners share the tokens where they do not share the
            weights (arXiv 2205.05198).
        tp_comm_overlap: collectives of tensor parallelism run in pieces beside the products that
            they feed (Megatron's flag of this name).
        overlaps_messages: those between stages run beside computations, where the schedule is
            interleaved or runs by a list; 1F1B always waits for its messages.
        distributed_optimizer: replicas share the optimizer's states.
        gradient_bytes: of each gradient when replicas exchange it, 2 or 4.
        fp8: what is multiplied in FP8; None for bf16.

    Raises:
        ValueError: gradient_bytes is out of its range.
    """

    recompute: Recompute = "none"
    flash_attention: bool = True
    has_dropout: bool = False
    sequence_parallel: bool = True
    tp_comm_overlap: bool = False
    overlaps_messages: bool = True
    distributed_optimizer: bool = True
    gradient_bytes: int = 4
    fp8: FP8 | None = None

    def __post_init__(self) -> None:
        _GRADIENT_BYTES.check(gradient_bytes=self.gradient_bytes)


DEFAULT_OPTIONS = TrainingOptions()
"""How this project's scripts train if nothing else is asked for, but for messages of 1F1B."""
