"""The specs of transformer layers: Megatron's own, and for layers without Transformer Engine copies
in which this package's attention and norms replace Megatron's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron.early_exit.model.attention import TorchAttention
from megatron.early_exit.model.norm import TorchNorm


def gpt_layer_spec(
    model_config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layer specs of this pipeline stage, for `GPTModelConfig.transformer_layer_spec`.

    Everything but `--transformer-impl local` is Megatron's default, untouched."""
    config = model_config.transformer
    if config.transformer_impl != "local" or model_config.restore_modelopt_state:
        return default_layer_spec(model_config, cast(int, vp_stage))
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return TransformerBlockSubmodules(
        layer_specs=[_with_torch_modules(spec) for spec in block.layer_specs or []],
        layer_norm=TorchNorm,
    )


def mtp_spec_function(
    megatrons: Callable[..., MultiTokenPredictionBlockSubmodules | None],
) -> Callable[..., MultiTokenPredictionBlockSubmodules | None]:
    """Megatron's function for the specs of its multi-token-prediction module, around layers like
    those of `gpt_layer_spec`."""

    def own(
        config: GPTModelConfig, transformer_layer_spec: Any, vp_stage: int | None = None
    ) -> MultiTokenPredictionBlockSubmodules | None:
        block = megatrons(config, transformer_layer_spec, vp_stage=vp_stage)
        is_local = config.transformer.transformer_impl == "local"
        if block is None or not is_local or config.restore_modelopt_state:
            return block
        specs = [_mtp_with_torch_modules(spec) for spec in block.layer_specs or []]
        return replace(block, layer_specs=specs)

    return own


def _mtp_with_torch_modules(spec: ModuleSpec) -> ModuleSpec:
    """A copy of the spec of a layer that predicts one more token, with PyTorch's modules."""
    parts = cast(MultiTokenPredictionLayerSubmodules, spec.submodules)
    norms = {name: _torch_norm(getattr(parts, name)) for name in ("enorm", "hnorm", "layer_norm")}
    layer = _with_torch_modules(cast(ModuleSpec, parts.mtp_model_layer))
    return replace(spec, submodules=replace(parts, mtp_model_layer=layer, **norms))


def _with_torch_modules(spec: ModuleSpec) -> ModuleSpec:
    """A copy of the spec of a local layer that uses PyTorch's attention and norms."""
    layer = cast(TransformerLayerSubmodules, spec.submodules)
    attention = cast(ModuleSpec, layer.self_attention)
    # Plain and multi-latent attention name their parts differently.
    parts = cast(Any, attention.submodules)
    norms = {
        name: _torch_norm(getattr(parts, name))
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
        if hasattr(parts, name)
    }
    parts = replace(parts, core_attention=TorchAttention, **norms)
    return replace(
        spec,
        submodules=replace(
            layer,
            input_layernorm=_torch_norm(layer.input_layernorm),
            pre_mlp_layernorm=_torch_norm(layer.pre_mlp_layernorm),
            self_attention=replace(attention, submodules=parts),
        ),
    )


def _torch_norm(norm: Any) -> Any:
    """The norm that replaces `norm` of Megatron's spec."""
    return norm if norm in (IdentityOp, L2Norm, None) else TorchNorm
