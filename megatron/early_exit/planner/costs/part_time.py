"""Seconds of a part of a model: of its products with weights, and of its bytes in memory."""

from dataclasses import dataclass

from megatron.early_exit.planner.costs.kernels import Kernels
from megatron.early_exit.planner.costs.training_options import FP8

ACTIVATION_BYTES = {False: (4, 6), True: (6, 10)}
"""Bytes that the activation of an MLP moves for each entry of its width, in forward and backward,
without and with a gate: it reads what it needs, and writes one (in backward two, if gated)."""

# Bytes moved for each entry of a weight's gradient, which is added to that in fp32.
_ACCUMULATED = 8


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """What one part of a model takes.

    Attributes:
        forward_s: seconds of a forward.
        backward_s: seconds of a backward.
        weight_gradient_s: the part of backward_s that a zero-bubble schedule (arXiv
            2401.10241) can put off.
    """

    forward_s: float
    backward_s: float
    weight_gradient_s: float = 0.0

    def __add__(self, other: "PartTime") -> "PartTime":
        """Seconds of parts that run one after the other."""
        return PartTime(
            forward_s=self.forward_s + other.forward_s,
            backward_s=self.backward_s + other.backward_s,
            weight_gradient_s=self.weight_gradient_s + other.weight_gradient_s,
        )


def memory_time(kernels: Kernels, entries: float, forward: float, backward: float) -> PartTime:
    """Seconds to move so many bytes of each entry."""
    return PartTime(
        forward_s=kernels.memory_s(entries * forward),
        backward_s=kernels.memory_s(entries * backward),
    )


def product_time(
    kernels: Kernels,
    rows: float,
    inputs: float,
    outputs: float,
    fp8: FP8 | None = None,
    number: float = 1,
    padding: float = 0,
) -> PartTime:
    """Seconds of a product with weights of inputs x outputs, and of both of its gradients.

    Args:
        kernels: of the accelerator.
        rows: tokens that are multiplied.
        inputs: rows of the weights.
        outputs: columns of the weights.
        fp8: how all matrices become FP8; None for bf16.
        number: how many such products there are, which run together.
        padding: rows that tiles compute though they are not there, but in the weights' gradient.
    """
    in_fp8, computed = fp8 is not None, rows + padding

    def product_s(a: float, b: float, c: float, result_bytes: int = 2) -> float:
        return kernels.product_s(a, b, c, result_bytes, in_fp8, number)

    weight_gradient_s = product_s(inputs, rows, outputs, _ACCUMULATED)
    product = PartTime(
        forward_s=product_s(computed, inputs, outputs),
        backward_s=product_s(computed, outputs, inputs) + weight_gradient_s,
        weight_gradient_s=weight_gradient_s,
    )
    if fp8 is None:
        return product
    quantized = fp8.quantized_bytes
    return (
        product
        + memory_time(kernels, number * rows * inputs, quantized, 0)
        + memory_time(kernels, number * rows * outputs, 0, quantized)
    )
