"""What a backbone may not have beside exits."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.model.gpt_builder import (  # noqa: E402
    EarlyExitGPTModelConfig,
    check_backbone,
)


def check(transformer: dict[str, Any], **exits: Any) -> None:
    fields = {
        "num_layers": 4,
        "transformer_impl": "transformer_engine",
        "mtp_num_layers": None,
        "mtp_standalone": False,
        "cuda_graph_impl": "none",
        "overlap_moe_expert_parallel_comm": False,
        "experimental_attention_variant": None,
        "num_moe_experts": None,
        "fine_grained_activation_offloading": False,
        "offload_modules": [],
        "fp8_output_proj": False,
        "use_mup": False,
    }
    config = SimpleNamespace(
        transformer=SimpleNamespace(**{**fields, **transformer}),
        early_exit=EarlyExitConfig(**exits),
    )
    check_backbone(cast(EarlyExitGPTModelConfig, config))


def offloading(*modules: str) -> dict[str, Any]:
    return {"fine_grained_activation_offloading": True, "offload_modules": [*modules]}


@pytest.mark.parametrize(
    ("transformer", "exits", "message"),
    [
        (
            offloading("core_attn", "attn_norm"),
            {"exit_layer_nums": (2,)},
            "--offload-modules attn_norm cannot be combined with --exit-layer-nums: it frees the "
            "input of exits before their backward, allowed: the other modules",
        ),
        (
            offloading("attn_norm", "mlp_norm"),
            {"exit_layer_nums": (2,), "use_exit_mlp": True},
            "--offload-modules mlp_norm cannot be combined with --use-exit-mlp: it frees the "
            "input of exits before their backward, allowed: the other modules",
        ),
        (
            offloading("core_attn"),
            {"exit_layer_nums": (2,), "use_exit_block": True},
            "--fine-grained-activation-offloading cannot be combined with --use-exit-block: it "
            "counts the layers that run in the forward pass",
        ),
        (
            {"mtp_num_layers": 2, "mtp_standalone": True},
            {"exit_layer_nums": (2,)},
            "--mtp-num-layers 2 on a stage of its own, by --pipeline-model-parallel-layout, cannot "
            "be combined with --exit-layer-nums, allowed: behind the last layer of the decoder",
        ),
        (
            {"fp8_output_proj": True},
            {"exit_layer_nums": (2,)},
            "--fp8-output-proj cannot be combined with --exit-layer-nums: the exits' projections "
            "are not computed in FP8",
        ),
        (
            {"use_mup": True},
            {"exit_layer_nums": (2,), "share_final_head": True},
            "--use-mup cannot be combined with --share-final-head: it scales the logits of the "
            "model's own head, and exits do not",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_an_exit_cannot_have_is_refused(transformer, exits, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(transformer, **exits)


@pytest.mark.parametrize(
    ("transformer", "exits"),
    [
        (offloading("core_attn", "mlp_norm"), {"exit_layer_nums": (2,)}),
        (
            offloading("core_attn", "attn_norm"),
            {"exit_layer_nums": (2,), "use_exit_mlp": True, "use_exit_norm": True},
        ),
        ({**offloading("attn_norm", "mlp_norm"), "fp8_output_proj": True}, {}),
    ],
    ids=str,
)
def test_what_frees_no_input_of_an_exit_is_allowed(transformer, exits):
    check(transformer, **exits)
