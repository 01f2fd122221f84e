"""The checkpoints of `serve_load.py`: random weights, with a tokenizer."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import tokenizers
import torch
import transformers

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.lazy import LazyTensor
from megatron.early_exit.checkpoint.tokenizer import HUGGINGFACE_TYPE, TokenizerDescription
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.checkpoint.writer import write_checkpoint
from megatron.early_exit.config import EarlyExitConfig

_TINY = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=1024,
    max_position_embeddings=256,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    activation="silu",
    gated_linear_unit=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=False,
    params_dtype="float32",
)
SIZES = {
    "tiny": _TINY,
    "small": replace(
        _TINY,
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        num_query_groups=4,
        kv_channels=64,
    ),
}
"""A hundred thousand parameters, and 75 million."""
WORDS = "the quick brown fox jumps over a lazy dog and packs five dozen liquor jugs into my box"


def make_checkpoint(size: str, folder: Path) -> Path:
    """Write the model of a size, with two exits; returns its folder."""
    architecture = SIZES[size]
    layers = architecture.num_layers
    early_exit = EarlyExitConfig(exit_layer_nums=(layers // 4, layers // 2), use_exit_norm=True)
    source = folder / "tokenizer"
    _make_tokenizer(architecture.vocab_size).save_pretrained(source)
    tokenizer = TokenizerDescription(HUGGINGFACE_TYPE, str(source), eod_id=0)
    weights = {
        name: LazyTensor(shape, torch.float32, partial(_random, name, shape))
        for name, shape in weight_shapes(architecture, early_exit).items()
    }
    target = folder / size
    write_checkpoint(
        target, weights, ModelDescription(architecture, early_exit, tokenizer), Namespace()
    )
    return target


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weights are spread such that exits are neither always nor never confident."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    if len(shape) == 1:
        return torch.ones(shape)
    is_vocabulary = name.endswith(("embeddings.weight", "output_layer.weight"))
    scale = 3.0 if is_vocabulary or name.endswith(("proj.weight", "fc2.weight")) else 1.0
    return torch.randn(shape, generator=generator) * scale * shape[1] ** -0.5


def _make_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Its vocabulary has every byte and the words of the prompts."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{WORDS} {number}" for number in range(999)], trainer)
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="</s>"
    )
