"""Converts the arguments of EE-LLM (arXiv 2312.04916) to this package's descriptions of a model."""

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture, UnsupportedArchitecture
from megatron.early_exit.checkpoint.tokenizer import (
    SENTENCEPIECE_TYPES,
    TokenizerDescription,
    load_tokenizer,
)
from megatron.early_exit.config import PER_EXIT_DEFAULTS, EarlyExitConfig

_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size", "params_dtype")
_REFUSED = {
    "use_mcore_models": "--use-mcore-models",
    "retro_add_retriever": "--retro-add-retriever",
    "num_experts": "--num-experts",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "pipeline_model_parallel_split_rank": "--pipeline-model-parallel-split-rank",
}
"""Arguments with which EE-LLM saves other tensors than those supported, and their flags."""


def architecture_of(args: Namespace, vocab_size: int) -> Architecture:
    """The backbone.

    Args:
        args: EE-LLM's.
        vocab_size: tokens that exist.

    Raises:
        ValueError: an argument is missing, or asks for a kind of model that cannot be imported.
    """
    missing = next((name for name in _NEEDED if getattr(args, name, None) is None), None)
    if missing is not None:
        raise ValueError(f"the checkpoint's args do not say {missing}")
    for name, flag in _REFUSED.items():
        if getattr(args, name, None):
            raise UnsupportedArchitecture(f"{flag}: such a checkpoint cannot be imported")
    if getattr(args, "transformer_impl", "local") != "local":
        raise UnsupportedArchitecture(
            f"--transformer-impl {args.transformer_impl}: such a checkpoint cannot be imported, "
            "allowed: local"
        )
    known: dict[str, Any] = {"normalization": "LayerNorm", "add_bias_linear": True, **vars(args)}
    known["layernorm_zero_centered_gamma"] = getattr(args, "apply_layernorm_1p", False)
    if getattr(args, "onnx_safe", False):
        known["bias_gelu_fusion"] = False
    architecture = Architecture.from_args(Namespace(**known), vocab_size)
    if getattr(args, "openai_gelu", False):
        return replace(architecture, activation="gelu_tanh", gated_linear_unit=False)
    return architecture


def exits_of(args: Namespace) -> EarlyExitConfig:
    """The exits.

    Raises:
        ValueError: they contradict each other.
    """
    numbers = tuple(getattr(args, "exit_layer_nums", None) or ())
    if not numbers:
        return EarlyExitConfig()
    names = [f.name for f in fields(EarlyExitConfig)]
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    if has_idle_branches(args):
        given["use_exit_mlp"] = False
    if not given.get("exit_layer_weight_warmup_iters"):
        # EE-LLM takes values that have no effect, and saves them.
        given.pop("exit_layer_weight_init", None)
        given.pop("exit_layer_weight_warmup_style", None)
    for name in PER_EXIT_DEFAULTS:
        # Its own tool adds exits without values for their losses.
        if len(given.get(name, ())) != len(numbers):
            given.pop(name, None)
    return EarlyExitConfig(**given)


def has_idle_branches(args: Namespace) -> bool:
    """Whether layers have MLPs for exits that no exit uses: EE-LLM lets exits be before layers that
    have them."""
    return bool(getattr(args, "pre_exit", False) and getattr(args, "use_exit_mlp", False))


def tokenizer_of(
    args: Namespace, model: str | Path | None, kind: str | None
) -> tuple[TokenizerDescription, int]:
    """The tokenizer, and how many tokens the model was trained with.

    Args:
        args: EE-LLM's.
        model: the tokenizer's file or folder, `--tokenizer-model`; None is the one in `args`.
        kind: `--tokenizer-type`; None is the one in `args`.

    Raises:
        ValueError: it cannot be loaded, or is not the one that the model was trained with.
    """
    kind = kind or getattr(args, "tokenizer_type", None)
    model = model or getattr(args, "tokenizer_model", None)
    if kind is None:
        raise ValueError("the checkpoint's args name no tokenizer: give --tokenizer-type")
    if model is None or not Path(model).exists():
        raise ValueError(
            f"the checkpoint's tokenizer {model} is not there: give its file with --tokenizer-model"
        )
    path = str(Path(model).resolve())
    # Its other tokenizers add no tokens.
    is_legacy = kind == "SentencePieceTokenizer"
    num_extra = getattr(args, "vocab_extra_ids", 0) or 0 if is_legacy else 0
    description = TokenizerDescription(kind, path, legacy=is_legacy, num_extra_ids=num_extra)
    tokenizer = load_tokenizer(description, Path())
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer-type {kind} is not supported, allowed: HuggingFaceTokenizer, "
            f"{', '.join(SENTENCEPIECE_TYPES)}"
        )
    _check_padding(args, tokenizer.vocab_size, model)
    return replace(description, eod_id=tokenizer.eod_id), tokenizer.vocab_size


def _check_padding(args: Namespace, vocab_size: int, model: str | Path) -> None:
    divisor = getattr(args, "make_vocab_size_divisible_by", 128)
    multiple = divisor * getattr(args, "tensor_model_parallel_size", 1)
    padded = -(-vocab_size // multiple) * multiple
    if padded != args.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model {model}: has {vocab_size} tokens, which makes {padded} rows with "
            f"padding, and the checkpoint has {args.padded_vocab_size}: give the tokenizer that "
            "it was trained with"
        )
