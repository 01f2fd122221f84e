"""The architecture of a model: everything that determines its outputs, except the weights.

`Architecture` is what inference needs to know about a backbone. It comes from the description that
training writes beside its checkpoints, or from the arguments inside a plain Megatron checkpoint.
Features that inference cannot compute yet are refused here; the message names their flag.
"""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from megatron.early_exit.errors import FieldError, as_flag, out_of_range
from megatron.early_exit.ranges import INDEX, ONE_OR_MORE

Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu", "gelu_tanh", "silu", "squared_relu", "quick_gelu"]
PositionEmbedding = Literal["rope", "learned_absolute", "none"]
ParamsDtype = Literal["float32", "bfloat16", "float16"]


class UnsupportedArchitecture(ValueError):
    """A model that inference cannot compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A GPT backbone. Fields carry Megatron's names where Megatron has one.

    Raises:
        ValueError: fields contradict each other.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Size of one attention head."""
    vocab_size: int
    """Number of tokens; further rows of the embedding are padding."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    normalization: Normalization
    layernorm_epsilon: float
    layernorm_zero_centered_gamma: bool = False
    """Whether the stored gain of every norm is the gain minus one."""
    activation: Activation
    gated_linear_unit: bool
    """The first linear layer of the MLP holds [gate; up] and the activation is on the gate."""
    add_bias_linear: bool
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    softmax_scale: float | None = None
    """Factor on the attention scores; None is 1 / sqrt(kv_channels)."""
    position_embedding_type: PositionEmbedding
    rotary_base: float = 10000
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rotary_seq_len_interpolation_factor: float | None = None
    rope_scaling_factor: float | None = None
    """Factor of Llama 3's frequency scaling; None is no scaling."""
    share_embeddings_and_output_weights: bool
    params_dtype: ParamsDtype
    mtp_num_layers: int = 0
    """Number of further tokens that Megatron's multi-token-prediction module predicts; 0 is a model
    without it."""
    mtp_use_repeated_layer: bool = False
    """Whether one layer of that module is applied for each of them."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.type is int):
            allowed_numbers = INDEX if name in _MAY_BE_ZERO else ONE_OR_MORE
            allowed_numbers.check(**{name: getattr(self, name)})
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise FieldError(name, "is unknown", ", ".join(allowed), value=value)
        if self.num_attention_heads % self.num_query_groups:
            known = f"divisors of num_attention_heads, {self.num_attention_heads}"
            raise out_of_range("num_query_groups", self.num_query_groups, known)
        if self.mtp_num_layers and self.position_embedding_type not in _MTP_POSITIONS:
            raise FieldError(
                "position_embedding_type",
                "is not possible with mtp_num_layers",
                ", ".join(_MTP_POSITIONS),
                value=self.position_embedding_type,
            )

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def mlp_weights(self) -> int:
        """Weights in the matrices of one layer's MLP."""
        return (3 if self.gated_linear_unit else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        heads = 2 * (self.num_attention_heads + self.num_query_groups)
        return self.hidden_size * heads * self.kv_channels + self.mlp_weights

    @property
    def mtp_stored_layers(self) -> int:
        """Layers of the multi-token-prediction module that have weights of their own."""
        return min(self.mtp_num_layers, 1) if self.mtp_use_repeated_layer else self.mtp_num_layers

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_args(cls, args: object, vocab_size: int | None = None) -> "Architecture":
        """Read the backbone from Megatron's validated arguments.

        Args:
            args: a namespace with Megatron's argument names.
            vocab_size: size of the tokenizer's vocabulary; by default that in the arguments, or
                else the padded size.

        Raises:
            UnsupportedArchitecture: an argument asks for something that inference cannot compute;
                the message names its flag.
        """
        _refuse_unsupported(args)

        def given(name: str, default: Any = None) -> Any:
            value = getattr(args, name, None)
            return default if value is None else value

        hidden_size, heads = given("hidden_size"), given("num_attention_heads")
        grouped = given("group_query_attention", False)
        activation, gated = _activation(args)
        # Arguments that are not there are as the defaults of these fields.
        optional = {
            f.name: given(f.name, f.default) for f in fields(cls) if f.default is not MISSING
        }
        optional["rope_scaling_factor"] = _rope_scaling_factor(args)
        return cls(
            **optional,
            # A run that tunes exits builds the first layers only.
            num_layers=given("full_num_layers", given("num_layers")),
            hidden_size=hidden_size,
            ffn_hidden_size=given("ffn_hidden_size", 4 * hidden_size),
            num_attention_heads=heads,
            num_query_groups=given("num_query_groups") if grouped else heads,
            kv_channels=given("kv_channels", hidden_size // heads),
            vocab_size=vocab_size or given("vocab_size") or given("padded_vocab_size"),
            max_position_embeddings=given("max_position_embeddings", given("seq_length")),
            normalization=given("normalization"),
            layernorm_epsilon=given("layernorm_epsilon", given("norm_epsilon")),
            activation=activation,
            gated_linear_unit=gated,
            add_bias_linear=given("add_bias_linear"),
            position_embedding_type=given("position_embedding_type"),
            share_embeddings_and_output_weights=not given("untie_embeddings_and_output_weights"),
            params_dtype=str(given("params_dtype")).removeprefix("torch."),  # type: ignore[arg-type]
        )


_CHOICES: dict[str, tuple[str, ...]] = {
    "normalization": get_args(Normalization),
    "activation": get_args(Activation),
    "position_embedding_type": get_args(PositionEmbedding),
    "params_dtype": get_args(ParamsDtype),
}

_MAY_BE_ZERO = ("mtp_num_layers",)
_MTP_POSITIONS = ("rope", "none")
"""Position embeddings with which Megatron builds its multi-token-prediction module."""

_UNSUPPORTED = (
    *("num_experts", "multi_latent_attention"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("hybrid_layer_pattern", "hybrid_override_pattern", "experimental_attention_variant"),
    *("linear_attention_freq", "window_size", "attention_output_gate", "qk_l2_norm"),
    *("no_rope_freq", "fp32_residual_connection"),
    *("apply_residual_connection_post_layernorm", "use_mup", "fp8_param_gather"),
    *("fp4_param_gather", "glu_linear_offset", "activation_func_clamp_value"),
)
"""Arguments that inference only knows as None, False, 0 or empty: all else changes what a model
computes."""

_KNOWN = {
    "softmax_type": ("vanilla", None),
    "position_embedding_type": (*get_args(PositionEmbedding), None),
}
"""Arguments of which inference knows these values."""


def _refuse_unsupported(args: object) -> None:
    for name in (*_UNSUPPORTED, *_KNOWN):
        value = getattr(args, name, None)
        is_known = value in _KNOWN[name] if name in _KNOWN else not value
        if not is_known:
            shown = "" if value is True else f" {value}"
            raise UnsupportedArchitecture(f"{as_flag(name)}{shown} is not supported by inference")


def _activation(args: object) -> tuple[Activation, bool]:
    if getattr(args, "swiglu", False):
        return "silu", True
    if getattr(args, "squared_relu", False):
        return "squared_relu", False
    if getattr(args, "quick_geglu", False):
        return "quick_gelu", True
    # Megatron's fused bias and GELU uses the tanh approximation, the unfused one does not.
    fused = getattr(args, "bias_gelu_fusion", False) and getattr(args, "add_bias_linear", True)
    return ("gelu_tanh" if fused else "gelu"), False


def _rope_scaling_factor(args: object) -> float | None:
    if not getattr(args, "use_rope_scaling", False):
        return None
    return float(getattr(args, "rope_scaling_factor", 8.0))
