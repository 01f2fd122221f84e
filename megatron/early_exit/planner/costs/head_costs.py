"""What the parts of an exit's head hold and keep; its output projection is counted apart."""

from math import prod

from megatron.early_exit.config import HeadPart
from megatron.early_exit.planner.costs.model_shape import ModelShape


def part_weights(part: HeadPart, shape: ModelShape) -> int:
    """Entries of the matrices of one part; vectors, such as a norm's, are left out."""
    match part.tensors:
        case "mlp":
            return shape.mlp_weights
        case "layer":
            return shape.layer_weights
    return sum(prod(matrix) for matrix in _matrices(part, shape))


def part_activation_bytes(part: HeadPart, shape: ModelShape) -> int:
    """What one part keeps of a token for the backward: of matrices of its own, their inputs."""
    match part.tensors:
        case "mlp":
            return shape.mlp_activation_bytes
        case "layer":
            return shape.layer_activation_bytes
    return sum(2 * inputs for _, inputs in _matrices(part, shape))


def _matrices(part: HeadPart, shape: ModelShape) -> list[tuple[int, ...]]:
    return [sizes for sizes in part.own_shapes(shape).values() if len(sizes) == 2]
