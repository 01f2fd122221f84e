"""The configuration of a model with exits, and the files that compute it."""

import shutil
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.huggingface.families import refuse_inexpressible, write_sizes
from megatron.early_exit.config import HEAD_PARTS, EarlyExitConfig

_FOLDER = Path(__file__).with_name("exported")
_CONFIGURATION, _MODELLING = "configuration_early_exit", "modeling_early_exit"


def write_exit_config(a: Architecture, early_exit: EarlyExitConfig) -> dict[str, Any]:
    """A config.json for the class that comes with the folder.

    Raises:
        ValueError: the backbone is of another kind than the Llama family's.
    """
    refuse_inexpressible(a)
    return {
        "architectures": ["EarlyExitForCausalLM"],
        "model_type": "megatron_early_exit",
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION}.EarlyExitConfig",
            "AutoModelForCausalLM": f"{_MODELLING}.EarlyExitForCausalLM",
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
        **{part.field: getattr(early_exit, part.field) for part in HEAD_PARTS},
        "exit_vocab_size": early_exit.exit_vocab_size,
        "early_exit_threshold": None,
    }


def copy_modelling(folder: Path) -> None:
    """Copy the source files that compute the model into the folder of its weights."""
    for file in _FOLDER.glob("*_early_exit.py"):
        shutil.copyfile(file, folder / file.name)
