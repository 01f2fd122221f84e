"""Configuration of a decoder with exits."""

from typing import Any

from transformers import PretrainedConfig


class EarlyExitConfig(PretrainedConfig):
    """A decoder of the Llama family and the exits between its layers.

    Args:
        vocab_size: tokens.
        hidden_size: of the residual stream.
        intermediate_size: of the MLPs.
        num_hidden_layers: layers.
        num_attention_heads: query heads of each.
        num_key_value_heads: heads of keys and values of each.
        head_dim: size of a head.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: of every norm.
        rotary_base: of the rotary embeddings.
        rotary_linear_factor: divisor of the positions; None is 1.
        rotary_llama3_factor: divisor of slow frequencies, as in Llama 3.1; None is none.
        tie_word_embeddings: the output layer is the word embedding.
        qkv_bias: the projections to queries, keys and values have a bias.
        linear_bias: the other linear layers have one.
        qk_norm: queries and keys are normalised.
        exit_layers: numbers of layers run before each exit, ascending.
        use_exit_mlp: each exit has an MLP in place of that of the layer that it follows.
        use_exit_block: each exit has a layer of its own.
        use_exit_norm: each exit has a norm of its own.
        untie_exit_output_weights: each exit has an output projection of its own, else all use the
            word embedding.
        exit_vocab_size: tokens that the exits know, the first of the word embedding; None is all.
        exit_measure: what confidence is where the model comes from. `generate` leaves at exits by
            "max_probability" only, and refuses a threshold where this is another one.
        early_exit_threshold: least confidence to leave at an exit, 0 to 1, where `generate` is
            given none; None runs all layers.
        others: those of every configuration.
    """

    model_type = "megatron_early_exit"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1408,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 8,
        head_dim: int = 64,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rotary_base: float = 10000.0,
        rotary_linear_factor: float | None = None,
        rotary_llama3_factor: float | None = None,
        tie_word_embeddings: bool = False,
        qkv_bias: bool = False,
        linear_bias: bool = False,
        qk_norm: bool = False,
        exit_layers: tuple[int, ...] = (),
        use_exit_mlp: bool = False,
        use_exit_block: bool = False,
        use_exit_norm: bool = False,
        untie_exit_output_weights: bool = False,
        exit_vocab_size: int | None = None,
        exit_measure: str = "max_probability",
        early_exit_threshold: float | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rotary_base = rotary_base
        self.rotary_linear_factor = rotary_linear_factor
        self.rotary_llama3_factor = rotary_llama3_factor
        self.qkv_bias = qkv_bias
        self.linear_bias = linear_bias
        self.qk_norm = qk_norm
        self.exit_layers = list(exit_layers)
        self.use_exit_mlp = use_exit_mlp
        self.use_exit_block = use_exit_block
        self.use_exit_norm = use_exit_norm
        self.untie_exit_output_weights = untie_exit_output_weights
        self.exit_vocab_size = exit_vocab_size
        self.exit_measure = exit_measure
        self.early_exit_threshold = early_exit_threshold
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
