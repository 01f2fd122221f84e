"""A language model on paper: its weights, the operations it takes, the activations it keeps.

Counts for one token of a forward pass; operations are floating-point multiplications and
additions. Activations are those of "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198, section 4), with grouped queries and a gated MLP, and without the
attention matrix, which FlashAttention (arXiv 2205.14135) does not keep.
"""

from dataclasses import dataclass, fields

_BF16 = 2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a Llama-like model: RMSNorm, rotary positions, gated MLP, no biases.

    Attributes:
        num_layers: backbone layers.
        hidden_size: width of the hidden state.
        ffn_hidden_size: width of the MLP.
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        vocab_size: rows of the embedding, padded.
        seq_length: tokens of a sequence.
        tied_embedding: whether the final projection is the embedding.

    Raises:
        ValueError: a size is below 1, or heads do not divide what they share.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    tied_embedding: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1 and field.name != "tied_embedding":
                raise ValueError(
                    f"{field.name} {getattr(self, field.name)} is out of range, allowed: 1 or more"
                )
        for part, whole in (
            ("num_attention_heads", "hidden_size"),
            ("num_query_groups", "num_attention_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part} {getattr(self, part)} is out of range, allowed: divisors of {whole}, "
                    f"{getattr(self, whole)}"
                )

    @property
    def _qkv_size(self) -> int:
        head = self.hidden_size // self.num_attention_heads
        return self.hidden_size + 2 * self.num_query_groups * head

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's MLP."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_weights(self) -> int:
        """Weights of one layer; the norms' are left out."""
        return self.hidden_size * (self._qkv_size + self.hidden_size) + self.mlp_weights

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
