"""The models of `decode.py`: their weights, the bare products with them, and transformers on
them."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.quantization import SCALE_ENDING
from megatron.early_exit.checkpoint.weights import load_weights, model_weights, weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.exact_products import FastestLibrary
from megatron.early_exit.inference.model.linear import Function, make_linear
from megatron.early_exit.inference.model.quantized import TIED_PROJECTION, pack_quantized

SMOLLM2_135M = Architecture(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=2048,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    activation="silu",
    gated_linear_unit=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    rotary_base=100000,
    share_embeddings_and_output_weights=True,
    params_dtype="float32",
)
_EMBEDDING = "embedding.word_embeddings.weight"


Kind = Literal["packed", "plain", "loops"]
"""Packed weights are what the engine multiplies several rows with, plain ones are multiplied by
PyTorch's own function, and compiled loops are what compiled layers have for one row or two."""


class Matrix(NamedTuple):
    """A weight matrix [n, k], and the scales [n] of one in 8 bits."""

    values: Tensor
    scale: Tensor | None

    def packed_product(self, fastest: FastestLibrary) -> Function:
        """x [r, k] -> [r, n], as the engine multiplies several rows."""
        if self.scale is None:
            return make_linear(self.values)
        return make_linear(pack_quantized(self.values, self.scale, fastest))

    def plain_product(self) -> Function:
        """The same, by PyTorch's own function; for matrices that are not in 8 bits."""
        return partial(functional.linear, weight=self.values)


class Weights(NamedTuple):
    """A model's description and tensors."""

    architecture: Architecture
    early_exit: EarlyExitConfig
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The format of activations."""
        return self.tensors[_EMBEDDING].dtype

    @property
    def head(self) -> Matrix:
        """The final projection to the vocabulary."""
        names = ("output_layer.weight", TIED_PROJECTION, _EMBEDDING)
        return self._matrix(next(name for name in names if name in self.tensors))

    def layers(self, start: int, end: int) -> list[Matrix]:
        """The weight matrices of some layers, in the order in which they are used."""
        names = (
            *("self_attention.linear_qkv", "self_attention.linear_proj"),
            *("mlp.linear_fc1", "mlp.linear_fc2"),
        )
        return [
            self._matrix(f"decoder.layers.{layer}.{name}.weight")
            for layer in range(start, end)
            for name in names
        ]

    def _matrix(self, name: str) -> Matrix:
        return Matrix(self.tensors[name], self.tensors.get(f"{name}{SCALE_ENDING}"))

    def segment_bytes(self) -> tuple[list[int], int]:
        """Bytes of the matrices of each segment, and of one head."""
        positions = self.early_exit.positions
        cuts = [0, *positions, self.architecture.num_layers]
        segments = [sum(w.values.nbytes for w in self.layers(*cut)) for cut in pairwise(cuts)]
        return segments, self.head.values.nbytes


def random_weights(dtype: torch.dtype, share_behind: float = 1.0) -> Weights:
    """A model of SmolLM2-135M's shape with exits after layers 10 and 20.

    Args:
        dtype: of all tensors.
        share_behind: what layers behind the first exit add to the residual stream, relative to what
            the others add. The less it is, the more often that exit says what the final head says.
    """
    early_exit = EarlyExitConfig(exit_layer_nums=(10, 20), use_exit_norm=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in weight_shapes(SMOLLM2_135M, early_exit).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            scale = 0.04 * (share_behind if _adds_behind(name, early_exit.positions[0]) else 1.0)
            tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return Weights(SMOLLM2_135M, early_exit, tensors)


def _adds_behind(name: str, num_layers: int) -> bool:
    """Whether a matrix adds to the residual stream behind so many layers."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\..*\.(linear_proj|linear_fc2)\.weight", name)
    return found is not None and int(found[1]) >= num_layers


def saved_weights(path: Path, dtype: torch.dtype) -> Weights:
    """A model from a checkpoint."""
    location = locate(path)
    description = describe(location)
    architecture, early_exit = description.architecture, description.early_exit
    assert architecture is not None
    tensors = load_weights(model_weights(location, description), dtype, torch.device("cpu"))
    return Weights(architecture, early_exit, tensors)


def products(
    matrices: Sequence[Matrix], rows: int, dtype: torch.dtype, kind: Kind = "packed"
) -> Callable[[], None]:
    """A function that computes only the products of some matrices with inputs of `rows` rows.

    Args:
        matrices: in 8 bits only where they are packed.
        rows: one or two for compiled loops.
        dtype: of the inputs.
        kind: of the products.
    """
    sizes = {matrix.values.shape[1] for matrix in matrices}
    inputs = {size: torch.randn(rows, size).to(dtype) for size in sizes}
    fastest = FastestLibrary()
    loop = torch.compile(lambda weight, x: make_linear(weight)(x), dynamic=False)

    def product(matrix: Matrix) -> Function:
        if kind == "packed":
            return matrix.packed_product(fastest)
        return partial(loop, matrix.values) if kind == "loops" else matrix.plain_product()

    pairs = [(product(one), inputs[one.values.shape[1]]) for one in matrices]

    def multiply() -> None:
        for function, x in pairs:
            function(x)

    return multiply


class HuggingFace:
    """`generate` of Hugging Face's transformers on the backbone's weights.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, weights: Weights) -> None:
        import transformers

        a = weights.architecture
        config = transformers.LlamaConfig(
            vocab_size=a.vocab_size,
            hidden_size=a.hidden_size,
            intermediate_size=a.ffn_hidden_size,
            num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_attention_heads,
            num_key_value_heads=a.num_query_groups,
            max_position_embeddings=a.max_position_embeddings,
            rms_norm_eps=a.layernorm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": a.rotary_base},
            tie_word_embeddings=a.share_embeddings_and_output_weights,
            dtype=weights.dtype,
        )
        with torch.device("meta"):
            model: Any = transformers.LlamaForCausalLM(config)
        model.to_empty(device="cpu").to(weights.dtype)
        model.load_state_dict(_as_llama(weights), assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        self.model = model.eval()

    def seconds_per_token(self, prompt: list[int], count: int) -> float:
        """Seconds per token of greedy decoding, after the first token."""
        times: list[float] = []

        class Clock:
            def put(self, value: Any) -> None:
                times.append(perf_counter())

            def end(self) -> None: ...

        self._generate(torch.tensor([prompt]), count, Clock())
        # The first is the prompt's.
        return (times[-1] - times[1]) / (len(times) - 2)

    def answer(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Some tokens behind each of several prompts of one length, by greedy decoding."""
        tokens = torch.tensor(prompts)
        return self._generate(tokens, count)[:, tokens.shape[1] :].tolist()

    def _generate(self, tokens: Tensor, count: int, streamer: object = None) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
                streamer=streamer,
            )
        return found


def _as_llama(weights: Weights) -> dict[str, Tensor]:
    a, tensors = weights.architecture, weights.tensors
    per_group = a.num_attention_heads // a.num_query_groups
    state = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
        "lm_head.weight": weights.head.values,
    }
    for layer in range(a.num_layers):
        old, new = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{old}self_attention.", f"{old}mlp."
        qkv = tensors[f"{attention}linear_qkv.weight"]
        grouped = qkv.unflatten(0, (a.num_query_groups, per_group + 2, a.kv_channels))
        for name, part in zip("qkv", grouped.split((per_group, 1, 1), dim=1), strict=True):
            state[f"{new}self_attn.{name}_proj.weight"] = part.flatten(0, 2).contiguous()
        gate, up = tensors[f"{mlp}linear_fc1.weight"].chunk(2)
        state |= {
            f"{new}self_attn.o_proj.weight": tensors[f"{attention}linear_proj.weight"],
            f"{new}mlp.gate_proj.weight": gate.contiguous(),
            f"{new}mlp.up_proj.weight": up.contiguous(),
            f"{new}mlp.down_proj.weight": tensors[f"{mlp}linear_fc2.weight"],
            f"{new}input_layernorm.weight": tensors[f"{attention}linear_qkv.layer_norm_weight"],
            f"{new}post_attention_layernorm.weight": tensors[f"{mlp}linear_fc1.layer_norm_weight"],
        }
    return state
