"""The engine against Hugging Face's models on the same weights: same logits, same greedy text."""

import pytest
import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel

transformers = pytest.importorskip("transformers")
PROMPT = [5, 17, 3, 44, 8, 8, 1]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    source = reference.state_dict()
    weights = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
        "output_layer.weight": source["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, mlp = f"{old}self_attn.", f"{old}mlp."
        queries, keys, values = (
            source[f"{attention}{name}_proj.weight"].view(2, -1, 8, 32) for name in "qkv"
        )
        qkv = torch.cat((queries, keys, values), dim=1).reshape(-1, 32)
        weights |= {
            f"{new}self_attention.linear_qkv.layer_norm_weight": source[
                f"{old}input_layernorm.weight"
            ],
            f"{new}self_attention.linear_qkv.weight": qkv,
            f"{new}self_attention.linear_proj.weight": source[f"{attention}o_proj.weight"],
            f"{new}mlp.linear_fc1.layer_norm_weight": source[
                f"{old}post_attention_layernorm.weight"
            ],
            f"{new}mlp.linear_fc1.weight": torch.cat(
                (source[f"{mlp}gate_proj.weight"], source[f"{mlp}up_proj.weight"])
            ),
            f"{new}mlp.linear_fc2.weight": source[f"{mlp}down_proj.weight"],
        }
    architecture = Architecture(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=61,
        max_position_embeddings=64,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        activation="silu",
        gated_linear_unit=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        params_dtype="float32",
    )
    return reference, architecture, weights


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    source = reference.state_dict()
    weights = {
        "embedding.word_embeddings.weight": source["transformer.wte.weight"],
        "embedding.position_embeddings.weight": source["transformer.wpe.weight"],
    }
    names = {
        "ln_1.": "self_attention.linear_qkv.layer_norm_",
        "attn.c_attn.": "self_attention.linear_qkv.",
        "attn.c_proj.": "self_attention.linear_proj.",
        "ln_2.": "mlp.linear_fc1.layer_norm_",
        "mlp.c_fc.": "mlp.linear_fc1.",
        "mlp.c_proj.": "mlp.linear_fc2.",
    }
    for layer in range(config.n_layer):
        for old, new in names.items():
            for kind in ("weight", "bias"):
                tensor = source[f"transformer.h.{layer}.{old}{kind}"].t()
                if "attn.c_attn" in old:
                    tensor = tensor.unflatten(0, (3, 4, 8)).transpose(0, 1).flatten(0, 2)
                weights[f"decoder.layers.{layer}.{new}{kind}"] = tensor
    for kind in ("weight", "bias"):
        weights[f"decoder.final_layernorm.{kind}"] = source[f"transformer.ln_f.{kind}"]
    architecture = Architecture(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=61,
        max_position_embeddings=64,
        normalization="LayerNorm",
        layernorm_epsilon=config.layer_norm_epsilon,
        activation="gelu_tanh",
        gated_linear_unit=False,
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
        params_dtype="float32",
    )
    return reference, architecture, weights


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_and_greedy_tokens(make):
    reference, architecture, weights = make()
    model = SegmentedModel(architecture, EarlyExitConfig(), weights)
    runner = SegmentRunner(model, num_slots=1, capacity=len(PROMPT))
    with torch.inference_mode():
        hidden = runner.run(0, [Span(0, 0, len(PROMPT))], PROMPT)
        logits = model.final_head.logits(hidden)
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)

    with torch.inference_mode():
        generated = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
    result = EarlyExitEngine(model).generate([PROMPT], SamplingParams(max_tokens=24))[0]
    assert result.token_ids == generated[0, len(PROMPT) :].tolist()
