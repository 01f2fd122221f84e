"""Local layers: their norms and attention against reference formulas and Megatron's own modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelConfig  # noqa: E402

from megatron.early_exit.model.attention import TorchAttention  # noqa: E402
from megatron.early_exit.model.layer_specs import gpt_layer_spec  # noqa: E402
from megatron.early_exit.model.norm import TorchNorm  # noqa: E402

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 2,
    "moe_layer_freq": [0, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}


def make_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "normalization": "RMSNorm",
            "transformer_impl": "local",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **changes,
        }
    )


pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_computes_its_formula(kind: str, zero_centered: bool) -> None:
    config = make_config(normalization=kind, layernorm_zero_centered_gamma=zero_centered)
    norm = TorchNorm(config, 32, eps=1e-3)
    x = torch.randn(5, 2, 32) + 1
    centered = x if kind == "RMSNorm" else x - x.mean(-1, keepdim=True)
    plain = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), plain)
    with torch.no_grad():
        norm.weight += 0.5
    torch.testing.assert_close(norm(x), plain * 1.5)
    assert [name for name, _ in norm.named_parameters()] == (
        ["weight"] if kind == "RMSNorm" else ["weight", "bias"]
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_parameters_for_sequence_parallelism(sequence_parallel: bool) -> None:
    config = make_config(normalization="LayerNorm", tensor_model_parallel_size=2)
    config.sequence_parallel = sequence_parallel
    norm = TorchNorm(config, 32)
    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * 2


def test_norm_of_another_kind_is_refused() -> None:
    config = make_config()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="--normalization L2Norm is not supported"):
        TorchNorm(config, 32)


def attention(kind: type, config: TransformerConfig, mask: AttnMaskType, **options: Any) -> Any:
    return kind(
        config=config,
        layer_number=2,
        attn_mask_type=mask,
        attention_type="self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **options,
    )


def random_inputs(num_queries: int, num_keys: int) -> list[torch.Tensor]:
    heads = (num_queries, 4), (num_keys, 2), (num_keys, 2)
    return [torch.randn(s, 3, n, 8, requires_grad=True) for s, n in heads]


@pytest.mark.parametrize("scaled_by_layer", [False, True])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_and_its_gradients_equal_megatrons(
    scale: float | None, scaled_by_layer: bool
) -> None:
    config = make_config(
        apply_query_key_layer_scaling=scaled_by_layer, attention_softmax_in_fp32=True
    )
    inputs = random_inputs(7, 7)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).triu(1)
    ours, theirs = (
        attention(kind, config, AttnMaskType.causal, softmax_scale=scale)
        for kind in (TorchAttention, DotProductAttention)
    )
    expected = theirs(*inputs, mask)
    gradient = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, gradient)
    for given in (None, mask):
        context = ours(*inputs, given)
        torch.testing.assert_close(context, expected)
        torch.testing.assert_close(
            torch.autograd.grad(context, inputs, gradient), expected_gradients
        )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("kind", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_queries_are_aligned_with_the_last_keys(
    num_queries: int, num_keys: int, kind: AttnMaskType
) -> None:
    query, key, value = random_inputs(num_queries, num_keys)
    scores = torch.einsum("sbghd,tbgd->bghst", query.unflatten(2, (2, 2)), key) / math.sqrt(8)
    if kind == AttnMaskType.causal:
        position = torch.arange(num_keys)
        hidden = position > position[-num_queries:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    expected = torch.einsum("bghst,tbgd->sbghd", scores.softmax(-1), value).flatten(2)
    module = attention(TorchAttention, make_config(), AttnMaskType.causal)
    context = module(query, key, value, None, attn_mask_type=kind)
    torch.testing.assert_close(context, expected)


def test_attention_drops_only_in_training() -> None:
    module = attention(TorchAttention, make_config(attention_dropout=0.5), AttnMaskType.causal)
    inputs = random_inputs(5, 5)
    assert not torch.equal(module(*inputs, None), module(*inputs, None))
    module.eval()
    torch.testing.assert_close(module(*inputs, None), module(*inputs, None))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"window_size": (4, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"qk_clip": True}, "--qk-clip"),
        ({"log_max_attention_logit": True}, "--log-max-attention-logit"),
    ],
)
def test_attention_that_it_cannot_do_is_refused(changes: dict[str, Any], flag: str) -> None:
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{flag}.* needs --transformer-impl transformer_engine"):
        attention(TorchAttention, config, AttnMaskType.causal)


def test_inputs_that_it_cannot_use_are_refused() -> None:
    module = attention(TorchAttention, make_config(), AttnMaskType.causal)
    inputs = random_inputs(5, 5)
    with pytest.raises(ValueError, match="packed sequences"):
        module(*inputs, None, packed_seq_params=PackedSeqParams())
    with pytest.raises(ValueError, match="attention bias"):
        module(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="'padding' needs an attention mask"):
        module(*inputs, None, attn_mask_type=AttnMaskType.padding)


def build(spec: Any, **changes: Any) -> torch.nn.Module:
    config = GPTModelConfig(
        transformer=make_config(**changes),
        transformer_layer_spec=spec,
        vocab_size=64,
        seq_length=16,
        position_embedding_type="rope",
    )
    config.finalize()
    builder = config.get_builder_cls()(config)
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups())


def kinds(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "LayerNorm", "qk_layernorm": True},
        EXPERTS,
    ],
    ids=["dense", "qk norms", "experts"],
)
def test_model_differs_from_megatrons_only_in_its_norms_and_attention(
    changes: dict[str, Any],
) -> None:
    ours, theirs = build(gpt_layer_spec, **changes), build(None, **changes)
    mine, stock = kinds(ours), kinds(theirs)
    replaced = {name for name in mine if mine[name] != stock[name]}
    attentions = {name for name in replaced if name.endswith("core_attention")}
    assert len(attentions) == 3
    assert all(name.endswith("layernorm") for name in replaced - attentions)
    assert "decoder.final_layernorm" in replaced
    assert len(replaced - attentions) == 3 * (4 if "qk_layernorm" in changes else 2) + 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.sharded_state_dict().keys() == theirs.sharded_state_dict().keys()

    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(64, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(tokens, positions, None), theirs(tokens, positions, mask))
