"""What Megatron's flags, other than those of the layout, make of a layer's time and memory."""

from dataclasses import dataclass
from typing import Literal

from megatron.early_exit.ranges import Range

Recompute = Literal["none", "selective", "full"]
"""What is computed again in the backward instead of being kept: nothing, the core of the attention,
or whole layers (Megatron's --recompute-granularity)."""

_GRADIENT_BYTES = Range(least=2, most=4, is_integer=True)


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

    def __post_init__(self) -> None:
        _GRADIENT_BYTES.check(gradient_bytes=self.gradient_bytes)


DEFAULT_OPTIONS = TrainingOptions()
"""How this project's scripts train if nothing else is asked for, but for messages of 1F1B."""
