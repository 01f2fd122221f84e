"""A model on paper: its weights, the operations it takes, the activations it keeps.

Counts for one token of a forward pass; operations are floating-point multiplications and
additions. Activations are those of "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198, section 4), with grouped queries and a gated MLP, and without the
attention matrix, which FlashAttention (arXiv 2205.14135) does not keep.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import HeadPart
from megatron.early_exit.errors import out_of_range

_BF16 = 2
_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "activation": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "params_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class ModelShape(Architecture):
    """A backbone in training. Its heads make up its width, and its vocabulary includes padding.

    Raises:
        FieldError: a size is below 1, or heads do not divide what they share.
    """

    seq_length: int
    """Tokens of a sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            allowed = f"divisors of hidden_size, {self.hidden_size}"
            raise out_of_range("num_attention_heads", self.num_attention_heads, allowed)

    @classmethod
    def llama(cls, *, seq_length: int, **sizes: Any) -> "ModelShape":
        """A model that is known by its sizes: RMSNorm, rotary positions, gated MLP, no biases.

        Args:
            seq_length: tokens of a sequence.
            sizes: the sizes of an `Architecture` that do not follow from others, and whether it
                shares its embedding, which is off by default.
        """
        # Sizes that are out of range are refused by their own names.
        head = max(sizes["hidden_size"] // max(sizes["num_attention_heads"], 1), 1)
        derived = {"kv_channels": head, "max_position_embeddings": max(seq_length, 1)}
        return cls(seq_length=seq_length, **{**_LLAMA, **derived, **sizes})

    @property
    def _qkv_size(self) -> int:
        return self.hidden_size + 2 * self.num_query_groups * self.kv_channels

    @property
    def projection_weights(self) -> int:
        """Weights of the embedding, or of an output projection."""
        return self.vocab_size * self.hidden_size

    @property
    def attention_flops(self) -> int:
        """Operations on keys and values, of one layer for one token: half of them are masked."""
        return 2 * self.seq_length * self.hidden_size

    @property
    def mlp_activation_bytes(self) -> int:
        """What one MLP and its norm keep of a token for the backward."""
        # Inputs of the norm and of the MLP; gate, up, and their product.
        return _BF16 * (2 * self.hidden_size + 3 * self.ffn_hidden_size)

    @property
    def layer_activation_bytes(self) -> int:
        """What one layer keeps of a token for the backward."""
        # Inputs of the norm, of the queries' projection and of the output's; queries, keys, values.
        return _BF16 * (3 * self.hidden_size + self._qkv_size) + self.mlp_activation_bytes

    @property
    def layer_weight_gradient_bytes(self) -> int:
        """What the gradients of one layer's weights need: inputs, and gradients of outputs."""
        inputs = 3 * self.hidden_size + self.ffn_hidden_size
        outputs = self._qkv_size + 2 * self.hidden_size + 2 * self.ffn_hidden_size
        return min(_BF16 * (inputs + outputs), self.layer_activation_bytes)


def padded_vocab_size(vocab_size: int, tensor_parallel: int = 1) -> int:
    """Rows of a vocabulary with the padding that Megatron adds by default."""
    # Its --make-vocab-size-divisible-by.
    multiple = 128 * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def part_weights(part: HeadPart, shape: ModelShape) -> int:
    """Entries of the matrices of one part of an exit's head other than its output projection;
    vectors, such as a norm's, are left out."""
    match part.tensors:
        case "mlp":
            return shape.mlp_weights
        case "layer":
            return shape.layer_weights
    return sum(prod(matrix) for matrix in _matrices(part, shape))


def part_activation_bytes(part: HeadPart, shape: ModelShape) -> int:
    """What such a part keeps of a token for the backward: of matrices of its own, their inputs."""
    match part.tensors:
        case "mlp":
            return shape.mlp_activation_bytes
        case "layer":
            return shape.layer_activation_bytes
    return sum(2 * inputs for _, inputs in _matrices(part, shape))


def _matrices(part: HeadPart, shape: ModelShape) -> list[tuple[int, ...]]:
    return [sizes for sizes in part.own_shapes(shape).values() if len(sizes) == 2]
