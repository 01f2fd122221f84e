"""Exports one of our checkpoints to a folder that transformers loads.

With its multi-token-prediction module a model becomes a MiMo (arXiv 2505.07608).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.base import is_of_exit, is_of_mtp
from megatron.early_exit.checkpoint.draft_model import draft_model
from megatron.early_exit.checkpoint.huggingface.families import (
    MIMO,
    refuse_inexpressible,
    write_config,
    write_sizes,
)
from megatron.early_exit.checkpoint.huggingface.layouts import TensorLayout
from megatron.early_exit.checkpoint.huggingface.shard_writer import write_shards
from megatron.early_exit.checkpoint.huggingface.shards import open_shards
from megatron.early_exit.checkpoint.huggingface.tokenizers import export_tokenizer
from megatron.early_exit.checkpoint.huggingface.weight_map import origin
from megatron.early_exit.checkpoint.huggingface_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    as_end_tokens,
)
from megatron.early_exit.checkpoint.lazy import LazyTensor, LazyWeights
from megatron.early_exit.checkpoint.source import open_checkpoint
from megatron.early_exit.checkpoint.text_files import read_json
from megatron.early_exit.checkpoint.writer import Report, check_written, new_directory
from megatron.early_exit.config import HEAD_PARTS, EarlyExitConfig

MAX_SHARD_BYTES = 5 * 10**9
_EXPORTED = Path(__file__).with_name("exported")


@dataclass(frozen=True, slots=True)
class Export:
    """A model of ours under Hugging Face's names, not written yet.

    Attributes:
        config: of its config.json.
        weights: its tensors.
        sources: for each of them, which of ours it is or is a part of.
        tokenizer: puts its files into a folder; None where transformers has none that gives the
            tokens of the model's own.
        left_out: tensors of ours that no program would read there: the exits' gates, and the
            multi-token-prediction module.
    """

    config: Mapping[str, Any]
    weights: LazyWeights
    sources: Mapping[str, tuple[str, ...]]
    tokenizer: Callable[[Path], object] | None
    left_out: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.weights.values())

    @property
    def needs_remote_code(self) -> bool:
        """It is loaded with `trust_remote_code=True`: its class is not transformers' own."""
        return "auto_map" in self.config

    @property
    def is_mimo(self) -> bool:
        """Its class is MiMo's, the files of which are not in the folder."""
        return self.config["model_type"] == MIMO.model_type

    def write(
        self,
        target: Path,
        report: Report = lambda name, num_bytes: None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write the folder and read its tensors again.

        Args:
            target: a folder that is empty or does not exist.
            report: told of each tensor twice, when it is written and when it is found there.
            max_shard_bytes: of tensors in one file.

        Raises:
            ValueError: something cannot be read or written, or is not found as it was written;
                nothing is left at `target`.
        """
        with new_directory(target) as partial:
            if self.tokenizer is not None:
                self.tokenizer(partial)
            self._write_generation(partial / GENERATION_NAME)
            _write_json(partial / CONFIG_NAME, self.config)
            if self.needs_remote_code and not self.is_mimo:
                # The source files that compute the model.
                for file in _EXPORTED.glob("*_early_exit.py"):
                    shutil.copyfile(file, partial / file.name)
            hashes = write_shards(partial, self.weights, max_shard_bytes, report)
            check_written(open_shards(partial), hashes, report)

    def _write_generation(self, path: Path) -> None:
        """The settings for generation: those that came with the tokenizer, and all tokens that end
        a text."""
        names = ("bos_token_id", "eos_token_id")
        is_there = path.exists()
        settings = read_json(path) if is_there else {name: self.config[name] for name in names}
        ends = as_end_tokens(settings.get("eos_token_id"))
        all_ends = as_end_tokens(self.config["eos_token_id"])
        if not is_there or not set(all_ends) <= set(ends):
            merged = list(dict.fromkeys((*ends, *all_ends)))
            value = merged if len(merged) > 1 else next(iter(merged), None)
            _write_json(path, {**settings, "eos_token_id": value})


def export_hf(
    source: str | Path,
    target: Path,
    report: Report = lambda name, num_bytes: None,
    plain: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    draft_of_exit: int | None = None,
    with_mtp: bool = False,
) -> Export:
    """Write a checkpoint as a folder for transformers; see `open_export` and `Export.write`.

    Returns:
        What has been written.
    """
    export = open_export(source, plain, draft_of_exit, with_mtp)
    export.write(target, report, max_shard_bytes)
    return export


def open_export(
    source: str | Path,
    plain: bool = False,
    draft_of_exit: int | None = None,
    with_mtp: bool = False,
) -> Export:
    """Open a checkpoint for its export.

    A model without exits becomes one of transformers' own (Llama, Mistral, Qwen2 or Qwen3), and so
    does one whose exits share its final head: transformers' `generate(assistant_early_exit=k)`
    drafts tokens with just that. One with other exits comes with a class of its own, which
    transformers runs with `trust_remote_code=True` (the tokenizer is to be loaded with it too:
    transformers asks for the model's configuration first). Its `generate(...,
    early_exit_threshold=0.8)` takes a token from the first exit that is confident enough, by its
    largest probability: gates are left out.

    Args:
        source: a save directory or one iteration in it; with exits only, its base is found.
        plain: leave the exits out. transformers' own `generate(assistant_early_exit=k)` drafts
            tokens with the first k layers, the final norm and the output layer: it fits models
            whose exits were trained as just that, a norm and the projection of the output layer.
        draft_of_exit: layers in front of an exit that is to become a model of its own, with those
            layers: a draft model for programs that know nothing of exits; see `draft_model`.
        with_mtp: write the model's multi-token-prediction module, as a MiMo: SGLang computes it as
            Megatron does, and transformers has no class for it. By default it is left out.

    Raises:
        ValueError: it cannot be read, or Hugging Face's Llama family has nothing like it.
    """
    conversion = open_checkpoint(source)
    if draft_of_exit is not None:
        if plain:
            raise ValueError("--plain has no effect with --draft-of-exit, which leaves no exits")
        if with_mtp:
            raise ValueError(
                "--with-mtp cannot be combined with --draft-of-exit, which leaves the "
                "multi-token-prediction module out"
            )
        try:
            conversion = draft_model(conversion, draft_of_exit)
        except ValueError as error:
            raise ValueError(f"checkpoint {source}: {error}") from error
    architecture = conversion.description.architecture
    early_exit = conversion.description.early_exit
    assert architecture is not None
    is_plain = plain or early_exit.share_final_head or not early_exit.positions
    try:
        if with_mtp and not architecture.mtp_num_layers:
            raise ValueError(
                "the model has no multi-token-prediction module, which --with-mtp would write"
            )
        if with_mtp and not is_plain:
            raise ValueError("--with-mtp has no effect on a folder with exits, allowed: --plain")
        if is_plain:
            config = write_config(architecture, with_mtp)
        else:
            config = _exit_config(architecture, early_exit)
        named = [name for name in conversion.weights if not (plain and is_of_exit(name))]
        left_out = tuple(
            name for name in named if _is_beside(name) or (is_of_mtp(name) and not with_mtp)
        )
        kept = {name: conversion.weights[name] for name in named if name not in left_out}
        weights, sources = _split(architecture, kept)
    except ValueError as error:
        raise ValueError(f"checkpoint {source}: {error}") from error
    tokenizer = export_tokenizer(conversion.description.tokenizer)
    config |= tokenizer.special_tokens
    return Export(config, weights, sources, tokenizer.install, left_out)


def _is_beside(name: str) -> bool:
    """Whether a tensor is of a part of an exit that its predictions do not depend on."""
    modules = {part.module for part in HEAD_PARTS if part.is_beside}
    return is_of_exit(name) and name.split(".")[2] in modules


def _exit_config(a: Architecture, early_exit: EarlyExitConfig) -> dict[str, Any]:
    """A config.json for the class that comes with the folder.

    Raises:
        ValueError: the backbone is of another kind than the Llama family's.
    """
    refuse_inexpressible(a)
    return {
        "architectures": ["EarlyExitForCausalLM"],
        "model_type": "megatron_early_exit",
        "auto_map": {
            "AutoConfig": "configuration_early_exit.EarlyExitConfig",
            "AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM",
        },
        **write_sizes(a),
        # Not under the names that transformers rewrites when it reads them.
        "rotary_base": float(a.rotary_base),
        "rotary_linear_factor": a.rotary_seq_len_interpolation_factor,
        "rotary_llama3_factor": a.rope_scaling_factor,
        "qkv_bias": a.qkv_bias,
        "linear_bias": a.add_bias_linear,
        "qk_norm": a.qk_layernorm,
        "exit_layers": list(early_exit.positions),
        **{
            part.field: getattr(early_exit, part.field) for part in HEAD_PARTS if not part.is_beside
        },
        "exit_vocab_size": early_exit.exit_vocab_size,
        "exit_measure": early_exit.exit_measure,
        "early_exit_threshold": None,
    }


def _split(
    architecture: Architecture, weights: LazyWeights
) -> tuple[dict[str, LazyTensor], dict[str, tuple[str, ...]]]:
    """The tensors under Hugging Face's names, and which of ours each is from."""
    split: dict[str, LazyTensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for ours, whole in weights.items():
        made_of = origin(ours)
        shapes = made_of.layout.shapes(architecture, whole.shape)
        for place, (name, shape) in enumerate(zip(made_of.names, shapes, strict=True)):
            read = _reading(architecture, whole, made_of.layout, place)
            split[name] = LazyTensor(shape, whole.dtype, read)
            sources[name] = (ours,)
    return split, sources


def _reading(
    architecture: Architecture, whole: LazyTensor, layout: TensorLayout, place: int
) -> Any:
    def read() -> Tensor:
        return layout.split(architecture, whole.read())[place]

    return read


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
