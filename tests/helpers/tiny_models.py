"""Small random models of every kind that inference computes."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.base import is_of_mtp
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

LLAMA = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=64,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    activation="silu",
    gated_linear_unit=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=False,
    params_dtype="float32",
)

GPT2 = replace(
    LLAMA,
    num_query_groups=4,
    ffn_hidden_size=64,
    normalization="LayerNorm",
    activation="gelu_tanh",
    gated_linear_unit=False,
    add_bias_linear=True,
    position_embedding_type="learned_absolute",
    share_embeddings_and_output_weights=True,
)

ARCHITECTURES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "interleaved partial rope": replace(
        LLAMA, kv_channels=12, rotary_percent=0.5, rotary_interleaved=True
    ),
    "partial rope, wide heads": replace(LLAMA, kv_channels=12, rotary_percent=0.34),
    "llama3": replace(LLAMA, rotary_base=5e5, rope_scaling_factor=8.0, num_query_groups=1),
    "qwen": replace(LLAMA, add_qkv_bias=True, qk_layernorm=True, rotary_base=1e6),
    "nemotron": replace(
        GPT2,
        activation="squared_relu",
        layernorm_zero_centered_gamma=True,
        position_embedding_type="rope",
        rotary_seq_len_interpolation_factor=2.0,
        qk_layernorm=True,
        num_query_groups=2,
    ),
    "odd ones": replace(
        GPT2,
        activation="quick_gelu",
        gated_linear_unit=True,
        softmax_scale=0.2,
        position_embedding_type="none",
    ),
}

MTP = {
    "two layers": replace(LLAMA, mtp_num_layers=2),
    "a repeated layer": replace(
        ARCHITECTURES["nemotron"], mtp_num_layers=3, mtp_use_repeated_layer=True
    ),
}
"""Models with Megatron's multi-token-prediction module."""

HEADS: dict[str, dict[str, Any]] = {
    "projection": {},
    "untied": {"untie_exit_output_weights": True},
    "norm": {"use_exit_norm": True},
    "final head": {"share_final_head": True},
    "few answers": {"use_exit_norm": True, "exit_vocab_size": 40},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True},
    "block": {"use_exit_block": True, "use_exit_norm": True},
    "all": {
        "use_exit_mlp": True,
        "use_exit_block": True,
        "use_exit_norm": True,
        "untie_exit_output_weights": True,
    },
}


@dataclass(frozen=True)
class TinyModel:
    """A model with weights that are spread such that exits are neither always nor never
    confident."""

    architecture: Architecture
    early_exit: EarlyExitConfig
    weights: dict[str, Tensor]

    @cached_property
    def segmented(self) -> SegmentedModel:
        return SegmentedModel(self.architecture, self.early_exit, self.weights)


def make_model(
    architecture: Architecture = LLAMA,
    exits: tuple[int, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **heads: Any,
) -> TinyModel:
    """A random model.

    Args:
        architecture: shape of the backbone.
        exits: layers with an exit, as `--exit-layer-nums`.
        seed: of the weights.
        dtype: of the weights.
        heads: further fields of `EarlyExitConfig`.
    """
    early_exit = EarlyExitConfig(exit_layer_nums=exits, **heads)
    # With gates or a multi-token-prediction module and without, the rest of a model is the same.
    generator, of_gates, of_mtp = (torch.Generator().manual_seed(seed + n) for n in (0, 0, 1))
    weights: dict[str, Tensor] = {}
    has_norm = early_exit.use_exit_norm or early_exit.share_final_head
    tied_without_norm = not (early_exit.untie_exit_output_weights or has_norm)
    vocabulary_scale = 1.3 if tied_without_norm else 3.0
    for name, shape in weight_shapes(architecture, early_exit).items():
        own = of_gates if ".gate." in name else of_mtp if is_of_mtp(name) else generator
        tensor = torch.randn(shape, generator=own)
        if len(shape) == 2:
            tensor *= shape[1] ** -0.5
        else:
            tensor *= 0.1
        if name.endswith(("norm_weight", "norm.weight")):
            tensor += 0.0 if architecture.layernorm_zero_centered_gamma else 1.0
        if name.endswith(("embeddings.weight", "output_layer.weight", "projection.weight")):
            tensor *= vocabulary_scale
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            # Else tied heads would repeat the last token: its embedding would dominate.
            tensor *= 3.0
        weights[name] = tensor.to(dtype)
    return TinyModel(architecture, early_exit, weights)


def save_checkpoint(
    model: TinyModel, save_dir: Path, padding: int = 3, stacked: bool = True
) -> Path:
    """Write a model in the format of Megatron's distributed checkpoints.

    Args:
        model: the model to write.
        save_dir: gets one iteration and the file that names it.
        padding: rows to add to matrices over the vocabulary.
        stacked: layers in one tensor, as Megatron does for equal layers; else one by one.

    Returns:
        The directory of the iteration.
    """
    state: dict[str, Tensor] = {}
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in model.weights.items():
        if tensor.shape[0] == model.architecture.vocab_size and tensor.dim() == 2:
            tensor = torch.cat((tensor, torch.full((padding, tensor.shape[1]), 9.0)))
        if stacked and name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.").partition(".")[2]
            layers.setdefault(f"decoder.layers.{rest}", []).append(tensor)
        else:
            state[name] = tensor
    state |= {name: torch.stack(tensors) for name, tensors in layers.items()}
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(2, 2)
    iteration_dir = save_dir / "iter_0000007"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(iteration_dir), no_dist=True)
    (save_dir / "latest_checkpointed_iteration.txt").write_text("7")
    return iteration_dir
