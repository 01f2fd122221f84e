"""Shapes of models that people serve, for tests that have no memory for their weights."""

from dataclasses import replace

from tests.helpers.tiny_models import LLAMA

LLAMA_3_1_8B = replace(
    LLAMA,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    params_dtype="bfloat16",
)
LARGE = {
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Qwen3-8B": replace(
        LLAMA_3_1_8B,
        num_layers=36,
        ffn_hidden_size=12288,
        vocab_size=151936,
        max_position_embeddings=40960,
        qk_layernorm=True,
    ),
    "Llama-2-7B": replace(
        LLAMA_3_1_8B,
        ffn_hidden_size=11008,
        num_query_groups=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
}
