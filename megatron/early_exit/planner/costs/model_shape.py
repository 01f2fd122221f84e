"""A model on paper: its weights, the operations it takes, the activations it keeps.

Counts for one token. Activations are those of "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4), with grouped queries and gated MLPs.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import HeadPart

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
    """A backbone in training. Its vocabulary includes padding.

    Raises:
        FieldError: a size is below 1, or heads do not divide what they share.
    """

    seq_length: int
    """Tokens of a sequence."""

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
    def query_size(self) -> int:
        """Entries of the queries of a token."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Entries of the queries, keys and values of a token."""
        return self.query_size + 2 * self.num_query_groups * self.kv_channels

    @property
    def projection_weights(self) -> int:
        """Weights of the embedding, or of an output projection."""
        return self.vocab_size * self.hidden_size

    @property
    def training_flops(self) -> float:
        """Operations of a forward and a backward that no recomputation adds to: what model FLOP/s
        utilization is counted with, with all of the attention matrix (arXiv 2205.05198, section 6).
        """
        attention = 4 * self.seq_length * self.query_size
        layer = 2 * self.layer_weights + attention
        return 3 * (self.num_layers * layer + 2 * self.projection_weights)

    @property
    def mlp_activation_bytes(self) -> int:
        """What one MLP and its norm keep of a token for the backward."""
        # Inputs of the norm and of the MLP; of a gated one the gate, up, and their product.
        return _BF16 * (2 * self.hidden_size + (2 + self.gated_linear_unit) * self.ffn_hidden_size)

    @property
    def attention_activation_bytes(self) -> int:
        """What one attention and its norm keep of a token for the backward."""
        # Inputs of the norm, of the queries' projection and of the output's; queries, keys, values.
        return _BF16 * (2 * self.hidden_size + self.query_size + self.qkv_size)

    @property
    def outer_activation_bytes(self) -> int:
        """The part of what a layer keeps that tensor parallelism divides only together with
        sequence parallelism: inputs of two norms and of the products behind them."""
        return _BF16 * 4 * self.hidden_size

    @property
    def matrix_entries(self) -> int:
        """Entries of the attention matrix of a token."""
        return self.num_attention_heads * self.seq_length

    @property
    def layer_activation_bytes(self) -> int:
        """What one layer keeps of a token for the backward, without dropout and without the
        attention matrix."""
        return self.attention_activation_bytes + self.mlp_activation_bytes

    @property
    def layer_weight_gradient_bytes(self) -> int:
        """What the gradients of one layer's weights need: inputs, and gradients of outputs."""
        inputs = 2 * self.hidden_size + self.query_size + self.ffn_hidden_size
        outputs = self.qkv_size + 2 * self.hidden_size
        outputs += (1 + self.gated_linear_unit) * self.ffn_hidden_size
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
