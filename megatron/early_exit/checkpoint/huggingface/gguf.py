"""Models in a GGUF file, llama.cpp's format: read by transformers, which undoes their quantisation.

All of a model is in memory then, as fp32.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.huggingface.families import FAMILIES
from megatron.early_exit.checkpoint.huggingface.tokenizers import SPECIAL_TOKENS
from megatron.early_exit.checkpoint.huggingface_config import CONFIG_NAME, as_end_tokens
from megatron.early_exit.checkpoint.lazy import LazyTensor

_READ = tuple(family.model_type for family in FAMILIES if not family.has_mtp)
_ENDS_OF_TURNS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Fields that transformers does not read."""


class GgufModel:
    """The contents of a GGUF file, and a folder with its tokenizer that exists as long as this
    object.

    Args:
        path: of the file.

    Attributes:
        config: the config.json that it would have.
        tokenizer_dir: the tokenizer in Hugging Face's format.

    Raises:
        ValueError: it is damaged, of another kind of model, or needs packages that are missing.
    """

    def __init__(self, path: Path) -> None:
        context, num_stored, ends = _check(path)
        model = _load(path, "AutoModelForCausalLM", dtype=torch.float32)
        self._tensors: Mapping[str, Tensor] = dict(model.named_parameters())
        if len(self._tensors) != num_stored:
            # What it does not know it leaves out, and what it misses it draws at random.
            raise ValueError(
                f"{path} holds {num_stored} tensors, and transformers reads a model of "
                f"{len(self._tensors)} from it"
            )
        self.config: dict[str, Any] = model.config.to_dict()
        # It says how the file was quantised, which the weights in memory no longer are.
        self.config.pop("quantization_config", None)
        self.config["architectures"] = [type(model).__name__]
        self.config["max_position_embeddings"] = context
        if ends:
            known = as_end_tokens(self.config.get("eos_token_id"))
            self.config["eos_token_id"] = list(dict.fromkeys((*known, *ends)))
        self.tokenizer_dir = Path(tempfile.mkdtemp(prefix="early_exit_gguf_"))
        weakref.finalize(self, shutil.rmtree, self.tokenizer_dir, ignore_errors=True)
        _load(path, "AutoTokenizer").save_pretrained(str(self.tokenizer_dir))
        kept = {name: self.config.get(name) for name in ("model_type", *SPECIAL_TOKENS)}
        (self.tokenizer_dir / CONFIG_NAME).write_text(json.dumps(kept), encoding="utf-8")

    def tensors(self) -> dict[str, LazyTensor]:
        """The weights, each of which keeps all of this alive."""

        def lazy(name: str, tensor: Tensor) -> LazyTensor:
            return LazyTensor(
                tuple(tensor.shape), tensor.dtype, lambda: self._tensors[name].detach()
            )

        return {name: lazy(name, tensor) for name, tensor in self._tensors.items()}


def _load(path: Path, name: str, **options: Any) -> Any:
    """Load the file with one of transformers' automatic classes."""
    try:
        import transformers

        kind = getattr(transformers, name)
        source = {"gguf_file": path.name, "local_files_only": True}
        return kind.from_pretrained(str(path.parent), **source, **options)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read by transformers: {reason}") from error


def _check(path: Path) -> tuple[int, int, tuple[int, ...]]:
    """The longest sequence, how many tensors there are, and the tokens that end a turn, of a file
    whose rotary embeddings transformers will not get wrong."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"{path}: reading GGUF needs the gguf package") from error
    try:
        reader: Any = GGUFReader(str(path))
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            # Its lists of tokens are long, and of no interest here.
            if not name.startswith("tokenizer.") or name in _ENDS_OF_TURNS
        }
        names = [tensor.name for tensor in reader.tensors]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    kind = fields.get("general.architecture")
    if kind not in _READ:
        raise ValueError(
            f"{path}: architecture {kind} is not supported, allowed: {', '.join(_READ)}"
        )
    context: int = fields.get(f"{kind}.context_length", 0)
    # transformers reads neither of these, and would compute another model without a word.
    if "rope_freqs.weight" in names:
        raise ValueError(f"{path}: scaled rotary frequencies (rope_freqs.weight) are not supported")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{path}: rope.scaling.type {scaling} is not supported, allowed: none")
    window = fields.get(f"{kind}.attention.sliding_window") or context
    if window < context:
        raise ValueError(
            f"{path}: sliding_window {window} is not supported, allowed: context_length {context} "
            "or more"
        )
    ends = as_end_tokens([fields.get(name) for name in _ENDS_OF_TURNS])
    return context, len(names), ends
