"""Small random models in Hugging Face's format, of every kind that can be imported."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import ModelOutput

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner

PROMPT = [5, 17, 3, 44, 8, 8, 1]

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

KINDS = {
    "Llama 2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "Llama 3.1": (
        transformers.LlamaConfig,
        {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 16384},
    ),
    "Llama, stretched": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "Llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "SmolLM2": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    ),
    "Mistral": (transformers.MistralConfig, {"head_dim": 12, "sliding_window": None}),
    "Mistral, long window": (transformers.MistralConfig, {"sliding_window": 96}),
    "Mistral, odd heads": (
        transformers.MistralConfig,
        {"hidden_size": 34, "head_dim": 8, "sliding_window": None},
    ),
    "Qwen2": (transformers.Qwen2Config, {"rope_parameters": {"rope_theta": 1e6}}),
    "Qwen2, tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 12}),
}


def _spread(model):
    """Randomise norms and biases, which transformers initialises with ones and zeros that hide
    mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_hf_reference(kind, seed=0, **changed):
    """A model of transformers' own, of one of `KINDS`."""
    config_class, own = KINDS[kind]
    config = config_class(**{**_SIZES, **own, **changed})
    torch.manual_seed(seed)
    return _spread(transformers.AutoModelForCausalLM.from_config(config).eval())


def save_hf_reference(reference, folder: Path, max_shard_size="5GB", **config) -> Path:
    """Save a model, and change its config.json; a value of None removes the entry."""
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    change_config(folder, **config)
    return folder


def change_config(folder: Path, **changed) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def reference_logits(reference, tokens):
    """[s, v]"""
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def engine_logits(engine, tokens, exit_index=None):
    """[s, v] of the final head, or of an exit without a block."""
    model = engine.model
    runner = SegmentRunner(model, num_slots=1, capacity=len(tokens))
    with torch.inference_mode():
        for index in range(len(model.segments)):
            given = tokens if index == 0 else None
            hidden = runner.run(index, [Span(0, 0, len(tokens))], given)
            if index == exit_index:
                return model.exits[index].head.logits(hidden)
        return model.final_head.logits(hidden)


def reference_tokens(reference, prompt, count, **options):
    """The greedy tokens of `generate`, which no token ends."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    with torch.inference_mode():
        generated = reference.generate(torch.tensor([prompt]), max_new_tokens=count, **options)
    return generated[0, len(prompt) :].tolist()


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer with the words w0, w1, ..., and with <s> and </s> as tokens 1 and 2."""
    import tokenizers

    words = {f"w{number}": number for number in range(size)}
    words["<s>"], words["</s>"] = words.pop("w1"), words.pop("w2")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="w0"
    ).save_pretrained(folder)


def cache_of(result: ModelOutput) -> Any:
    """Keys and values in the output of a model or of `generate`, whose name transformers 5.24
    changed."""
    return result.cache if hasattr(result, "cache") else result.past_key_values
