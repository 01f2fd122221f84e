"""Writes small models as checkpoints of the original EE-LLM.

Keys, shapes and arguments follow listings of checkpoints that EE-LLM itself wrote; see
`tests/unit/checkpoint/test_ee_llm.py` for the parts of them that are compared.
"""

import random
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType
from torch import Tensor

from tests.helpers.tiny_models import TinyModel

_ROW, _COLUMN, _GATED, _WHOLE = "row", "column", "gated", "whole"


def with_shared_norms(model: TinyModel) -> TinyModel:
    """Give a layer's MLP and its exit's MLP the same norm, because EE-LLM has one norm for both."""
    weights = dict(model.weights)
    for name in weights:
        _, position, *rest = name.split(".")
        if name.startswith("exits.") and rest[0] == "mlp" and "layer_norm" in name:
            weights[name] = weights[f"decoder.layers.{int(position) - 1}.{'.'.join(rest)}"]
    return TinyModel(model.architecture, model.early_exit, weights)


def saved_args(model: TinyModel, tensor: int, pipeline: int, divisor: int) -> Namespace:
    """Those of EE-LLM's two hundred arguments that matter, and some that do not."""
    a, e = model.architecture, model.early_exit
    multiple = divisor * tensor
    return Namespace(
        num_layers=a.num_layers,
        encoder_num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        group_query_attention=a.num_query_groups != a.num_attention_heads,
        num_query_groups=a.num_query_groups if a.num_query_groups != a.num_attention_heads else 1,
        kv_channels=a.kv_channels,
        seq_length=a.max_position_embeddings,
        max_position_embeddings=a.max_position_embeddings,
        normalization=a.normalization,
        norm_epsilon=a.layernorm_epsilon,
        apply_layernorm_1p=a.layernorm_zero_centered_gamma,
        swiglu=a.activation == "silu",
        squared_relu=a.activation == "squared_relu",
        openai_gelu=False,
        onnx_safe=None,
        bias_gelu_fusion=a.activation == "gelu_tanh",
        add_bias_linear=a.add_bias_linear,
        add_position_embedding=a.position_embedding_type == "learned_absolute",
        position_embedding_type=a.position_embedding_type,
        use_rotary_position_embeddings=False,
        rotary_percent=a.rotary_percent,
        rotary_seq_len_interpolation_factor=a.rotary_seq_len_interpolation_factor,
        untie_embeddings_and_output_weights=not a.share_embeddings_and_output_weights,
        make_vocab_size_divisible_by=divisor,
        padded_vocab_size=-(-a.vocab_size // multiple) * multiple,
        vocab_size=None,
        vocab_extra_ids=0,
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="/nowhere/tokenizer.model",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_split_rank=None,
        transformer_impl="local",
        use_mcore_models=False,
        retro_add_retriever=False,
        num_experts=None,
        fp32_residual_connection=False,
        apply_residual_connection_post_layernorm=False,
        params_dtype=torch.float32,
        model_type=ModelType.encoder_or_decoder,
        exit_layer_nums=list(e.exit_layer_nums),
        pre_exit=e.pre_exit,
        use_exit_norm=e.use_exit_norm,
        use_exit_mlp=e.use_exit_mlp,
        use_exit_block=e.use_exit_block,
        untie_exit_output_weights=e.untie_exit_output_weights,
        exit_layer_weight=list(e.exit_layer_weight),
        exit_layer_weight_init=list(e.exit_layer_weight_init),
        exit_layer_weight_warmup_iters=0,
        exit_layer_weight_warmup_style="linear",
        exit_layer_temperature=list(e.exit_layer_temperature),
        use_dynamic_exit_layer_weight=False,
        iteration=0,
        lr=1e-3,
        data_path=["text_document"],
    )


class _Writer:
    """The undivided tensors of each stage, and the parts that each of its ranks has."""

    def __init__(self, model: TinyModel, tensor: int, args: Namespace) -> None:
        self.model, self.tensor, self.args = model, tensor, args
        self.number_at = dict(
            zip(model.early_exit.positions, sorted(model.early_exit.exit_layer_nums), strict=True)
        )

    def stage(self, first: int, count: int) -> dict[str, Any]:
        """The language model of one stage, with undivided values: (tensor, how it is divided)."""
        weights, layers = self.model.weights, range(first, first + count)
        language_model: dict[str, Any] = {}
        if first == 0:
            embedding = {
                "word_embeddings": {
                    "weight": (self.padded("embedding.word_embeddings.weight"), _COLUMN)
                }
            }
            position = weights.get("embedding.position_embeddings.weight")
            if position is not None:
                embedding["position_embeddings"] = {"weight": (position, _WHOLE)}
            language_model["embedding"] = embedding
        own = [n for n in self.model.early_exit.exit_layer_nums if n - 1 in layers]
        position_of = {number: position for position, number in self.number_at.items()}
        if own and self.model.early_exit.untie_exit_output_weights:
            language_model["exit_output_layer"] = OrderedDict(
                (
                    f"{place}.weight",
                    (self.padded(f"exits.{position_of[number]}.projection.weight"), _COLUMN),
                )
                for place, number in enumerate(own)
            )
        encoder: OrderedDict[str, Any] = OrderedDict()
        for layer in layers:
            head = None
            if layer + 1 in own:
                head = f"exits.{position_of[layer + 1]}."
            encoder.update(self.layer(layer, f"layers.{layer - first}.", head))
        if layers.stop == self.model.architecture.num_layers:
            encoder.update(self.norm("decoder.final_layernorm.", "final_norm."))
            if "output_layer.weight" in weights:
                output = {"weight": (self.padded("output_layer.weight"), _COLUMN)}
                language_model["output_layer"] = output
        language_model["encoder"] = encoder
        return language_model

    def layer(self, layer: int, prefix: str, head: str | None) -> dict[str, Any]:
        e, own = self.model.early_exit, f"decoder.layers.{layer}."
        trunk = "trunk." if head is not None and e.use_exit_mlp else ""
        found = self.block(own, prefix, trunk)
        if head is not None and e.use_exit_norm:
            found |= self.norm(f"{head}norm.", f"{prefix}exit_norm.")
        if head is not None and e.use_exit_block:
            found |= self.block(f"{head}block.", f"{prefix}exit_block.", "")
        if trunk:
            found |= self.mlp(f"{head}mlp.", f"{prefix}mlp.branch.")
        return found

    def block(self, own: str, prefix: str, trunk: str) -> dict[str, Any]:
        attention = f"{own}self_attention."
        return {
            **self.norm(f"{attention}linear_qkv.layer_norm_", f"{prefix}input_norm."),
            **self.linear(
                f"{attention}linear_qkv.", f"{prefix}self_attention.query_key_value.", _COLUMN
            ),
            **self.linear(f"{attention}linear_proj.", f"{prefix}self_attention.dense.", _ROW),
            **self.norm(f"{own}mlp.linear_fc1.layer_norm_", f"{prefix}post_attention_norm."),
            **self.mlp(f"{own}mlp.", f"{prefix}mlp.{trunk}"),
        }

    def mlp(self, own: str, prefix: str) -> dict[str, Any]:
        inner = _GATED if self.model.architecture.gated_linear_unit else _COLUMN
        return {
            **self.linear(f"{own}linear_fc1.", f"{prefix}dense_h_to_4h.", inner),
            **self.linear(f"{own}linear_fc2.", f"{prefix}dense_4h_to_h.", _ROW),
        }

    def linear(self, own: str, prefix: str, division: str) -> dict[str, Any]:
        found = {f"{prefix}weight": (self.model.weights[f"{own}weight"], division)}
        if f"{own}bias" in self.model.weights:
            whole = _WHOLE if division == _ROW else division
            found[f"{prefix}bias"] = (self.model.weights[f"{own}bias"], whole)
        return found

    def norm(self, own: str, prefix: str) -> dict[str, Any]:
        names = ("weight", "bias")
        return {
            f"{prefix}{name}": (self.model.weights[f"{own}{name}"], _WHOLE)
            for name in names
            if f"{own}{name}" in self.model.weights
        }

    def padded(self, name: str) -> Tensor:
        tensor = self.model.weights[name]
        missing = self.args.padded_vocab_size - len(tensor)
        return torch.cat((tensor, torch.full((missing, tensor.shape[1]), 9.0)))

    def part(self, values: Any, rank: int) -> Any:
        if isinstance(values, dict):
            return type(values)((key, self.part(value, rank)) for key, value in values.items())
        tensor, division = values
        if division == _WHOLE:
            return tensor
        if division == _GATED:
            return torch.cat([half.chunk(self.tensor)[rank] for half in tensor.chunk(2)])
        return tensor.chunk(self.tensor, dim=1 if division == _ROW else 0)[rank].contiguous()


def save_ee_llm(
    model: TinyModel,
    save_dir: Path,
    tensor: int = 1,
    pipeline: int = 1,
    divisor: int = 32,
    **changed: Any,
) -> Path:
    """Write a model as EE-LLM does.

    Args:
        model: from `with_shared_norms`, if exits have MLPs.
        save_dir: gets one iteration and the file that names it.
        tensor: tensor-parallel ranks.
        pipeline: pipeline stages.
        divisor: `--make-vocab-size-divisible-by`.
        changed: arguments in place of the model's.

    Returns:
        The folder of the iteration.
    """
    args = saved_args(model, tensor, pipeline, divisor)
    writer = _Writer(model, tensor, args)
    vars(args).update(changed)
    iteration_dir = save_dir / "iter_0000800"
    count = model.architecture.num_layers // pipeline
    for stage in range(pipeline):
        whole = writer.stage(stage * count, count)
        for rank in range(tensor):
            state: dict[str, Any] = {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": 800,
                "model": {"language_model": writer.part(whole, rank)},
                # What training with its default flags saves beside the model.
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
                "opt_param_scheduler": {"max_lr": 1e-3},
                "rng_state": [
                    {
                        "random_rng_state": random.getstate(),
                        "np_rng_state": np.random.get_state(),
                        "torch_rng_state": torch.get_rng_state(),
                        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
                    }
                ],
            }
            if model.architecture.share_embeddings_and_output_weights and stage > 0:
                head = {"weight": writer.padded("embedding.word_embeddings.weight")}
                state["model"]["word_embeddings_for_head"] = head
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (iteration_dir / name).mkdir(parents=True)
            torch.save(state, iteration_dir / name / "model_optim_rng.pt")
    (save_dir / "latest_checkpointed_iteration.txt").write_text("800")
    return iteration_dir
