"""A model on paper: its weights, the operations it takes, the activations it keeps.

Counts for one token. Activations are those of "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4), with grouped queries and gated MLPs.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import HeadPart
from megatron.early_exit.planner.costs.experts import Experts

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
    experts: Experts | None = None
    """What each layer has in place of an MLP of `ffn_hidden_size`; None for the MLP."""

    @classmethod
    def llama(cls, *, seq_length: int, **sizes: Any) -> "ModelShape":
        """A model that is known by its sizes: RMSNorm (arXiv 1910.07467), rotary positions, gated
        MLP, no biases.

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
    def shared_mlp_size(self) -> int:
        """Width of the MLP that all tokens go through in a layer; 0 if there are only experts."""
        if self.experts is None:
            return self.ffn_hidden_size
        return self.experts.moe_shared_expert_intermediate_size

    @property
    def divided_weights(self) -> int:
        """Weights of one layer that tensor parallelism divides: all but experts and router."""
        heads = self.query_size + self.qkv_size
        return self.hidden_size * (heads + self._mlp_matrices * self.shared_mlp_size)

    @property
    def router_weights(self) -> int:
        """Weights of one layer that each accelerator has whole."""
        return 0 if self.experts is None else self.hidden_size * self.experts.num_experts

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of one layer."""
        if self.experts is None:
            return 0
        one = self.experts.weights(self.hidden_size, self._mlp_matrices)
        return self.experts.num_experts * one

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        return self.divided_weights + self.router_weights + self.expert_weights

    @property
    def used_layer_weights(self) -> float:
        """Those of the weights of one layer that a token is multiplied with."""
        if self.experts is None:
            return self.layer_weights
        used = self.experts.moe_router_topk / self.experts.num_experts
        return self.divided_weights + self.router_weights + used * self.expert_weights

    @property
    def _mlp_matrices(self) -> int:
        return 3 if self.gated_linear_unit else 2

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
        layer = 2 * self.used_layer_weights + attention
        return 3 * (self.num_layers * layer + 2 * self.projection_weights)

    @property
    def mlp_activation_bytes(self) -> int:
        """What one MLP, or the MLP beside the experts, and its norm keep of a token for the
        backward."""
        # Inputs of the norm and of the MLP; of a gated one the gate, up, and their product.
        return _BF16 * (2 * self.hidden_size + self._mlp_matrices * self.shared_mlp_size)

    def expert_activation_bytes(self, expert_tensor_parallel: int = 1) -> int:
        """What the experts keep of a token for the backward, beside their router's input.

        Args:
            expert_tensor_parallel: accelerators that share each expert, and each have its input.
        """
        if self.experts is None:
            return 0
        of_expert = self.hidden_size * expert_tensor_parallel
        of_expert += self._mlp_matrices * self.experts.moe_ffn_hidden_size
        copies = _BF16 * self.experts.moe_router_topk * of_expert
        return copies + self.experts.routed_bytes()

    def fp8_activation_bytes(self, expert_tensor_parallel: int = 1) -> int:
        """What a layer keeps of a token for the backward beyond what it does in bf16, if inputs of
        its products are kept in FP8: a byte less for each entry, but the output of the attention
        is kept twice, because its own backward needs it in bf16."""
        inputs = (1 + bool(self.shared_mlp_size)) * self.hidden_size + self.shared_mlp_size
        if self.experts is not None:
            of_expert = self.hidden_size * expert_tensor_parallel
            of_expert += self.experts.moe_ffn_hidden_size
            inputs += self.experts.moe_router_topk * of_expert
        return self.query_size - inputs

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
        inputs = 2 * self.hidden_size + self.query_size + self.shared_mlp_size
        outputs = self.qkv_size + 2 * self.hidden_size
        outputs += (1 + self.gated_linear_unit) * self.shared_mlp_size
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
