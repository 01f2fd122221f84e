"""How large everything is that the sections run: on a GPU as in real use, on a CPU tiny."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from decode_models import SMOLLM2_135M

from megatron.early_exit.checkpoint.architecture import Architecture

LLAMA_7B = replace(
    SMOLLM2_135M,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32000,
    max_position_embeddings=8192,
    rotary_base=10000,
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
)
"""Shaped like Mistral 7B: a Llama with one head of keys and values for four of queries. With the 32
heads of Llama 2 the caches of 64 sequences of 4096 tokens alone take 137 GB."""

LLAMA_2_7B = replace(LLAMA_7B, ffn_hidden_size=11008, num_query_groups=32)
"""For estimates only, see `LLAMA_7B`."""

_LLAMA_MEDIUM = replace(
    LLAMA_7B,
    num_layers=8,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    num_query_groups=4,
)
_LLAMA_TINY = replace(
    LLAMA_7B,
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=256,
    params_dtype="float32",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the sections run.

    Attributes:
        device: where.
        dtype: of weights, where it may be a fast one.
        model: for sections about correctness.
        compiled_model: for the one that compares compiled layers with plain ones.
        large_model: for the section about speed.
        greedy_tokens: to decode with each kind of attention.
        rows: numbers of rows for which compiled and plain layers are compared.
        prompt_lengths: of their prompts.
        compared_tokens: that each of these rows generates.
        repeats: of the same requests, after which memory must not have grown.
        batches: numbers of sequences for which speed is measured.
        contexts: tokens of their prompts.
        steps: of decoding that are timed in each round.
        rounds: of which the median counts.
        compiles_large_model: whether speed is measured with compiled layers too.
        copied_bytes: by whose copy the bandwidth of the memory is measured.
        training: Megatron's flags for the size of the model that is trained.
    """

    device: torch.device
    dtype: torch.dtype
    model: Architecture
    compiled_model: Architecture
    large_model: Architecture
    greedy_tokens: int = 200
    rows: tuple[int, ...] = tuple(range(1, 17))
    prompt_lengths: tuple[int, ...] = (127, 128, 129, 4095)
    compared_tokens: int = 4
    repeats: int = 3
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (128, 4096)
    steps: int = 32
    rounds: int = 3
    compiles_large_model: bool = True
    copied_bytes: int = 2**30
    training: Mapping[str, int] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


_TRAINED_ON_GPU = {
    # The CPU has to compute the same in a few seconds.
    "num-layers": 4,
    "hidden-size": 1024,
    "num-attention-heads": 16,
    "seq-length": 256,
    "vocab-size": 16000,
}
_TRAINED_ON_CPU = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "vocab-size": 128,
}


def sizes_for(device: torch.device) -> Sizes:
    """The sizes for a device."""
    if device.type == "cuda":
        return Sizes(
            device=device,
            dtype=torch.bfloat16,
            model=_LLAMA_MEDIUM,
            compiled_model=_LLAMA_MEDIUM,
            large_model=LLAMA_7B,
            training=_TRAINED_ON_GPU,
        )
    return Sizes(
        device=device,
        dtype=torch.float32,
        model=_LLAMA_TINY,
        # Each number of layers between two exits takes the compiler some seconds.
        compiled_model=replace(_LLAMA_TINY, num_layers=2),
        large_model=_LLAMA_TINY,
        prompt_lengths=(127, 128, 129),
        rows=(1, 2, 3, 8, 16),
        batches=(1, 4),
        contexts=(16, 96),
        steps=8,
        rounds=2,
        compiles_large_model=False,
        copied_bytes=2**25,
        training=_TRAINED_ON_CPU,
    )
