"""Rotary position embeddings in a `config.json`, as transformers writes them since version 5
(`rope_parameters`) or wrote them before (`rope_theta` and `rope_scaling`)."""

from collections.abc import Mapping
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import ABOVE_ZERO

_DEFAULT_BASE = 10000.0
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's Llama 3 scaling has built in; its factor alone is free."""


def read_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Architecture` that describe rotary embeddings.

    Args:
        config: what config.json holds.

    Raises:
        ValueError: they are of a kind that Megatron does not have.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping) or any(isinstance(v, Mapping) for v in settings.values()):
        raise ValueError("rope_parameters differ from layer to layer, allowed: one set for all")
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor {share} is not supported, allowed: 1.0")
    base = settings.get("rope_theta") or config.get("rope_theta") or _DEFAULT_BASE
    fields = {"rotary_base": positive_number("rope_theta", base)}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "linear":
        factor = positive_number("rope factor", settings.get("factor"))
        fields["rotary_seq_len_interpolation_factor"] = factor
    elif kind == "llama3":
        for name, built_in in _LLAMA3.items():
            if settings.get(name) != built_in:
                raise ValueError(
                    f"{name} {settings.get(name)} of the rope type llama3 is not supported, "
                    f"allowed: {built_in}"
                )
        fields["rope_scaling_factor"] = positive_number("rope factor", settings.get("factor"))
    elif kind != "default":
        raise ValueError(
            f"rope type {kind!r} is not supported, allowed: default, linear and llama3"
        )
    return fields


def write_rotary(a: Architecture) -> dict[str, Any]:
    """The entries of a config.json, in the older form, which every version understands.

    Raises:
        ValueError: both scalings are on.
    """
    linear, llama3 = a.rotary_seq_len_interpolation_factor, a.rope_scaling_factor
    if linear is not None and llama3 is not None:
        raise ValueError(
            "--rotary-seq-len-interpolation-factor with --use-rope-scaling cannot be expressed in "
            "Hugging Face's Llama family, allowed: one of the two"
        )
    scaling: dict[str, Any] | None = None
    if linear is not None:
        scaling = {"rope_type": "linear", "factor": float(linear)}
    elif llama3 is not None:
        scaling = {"rope_type": "llama3", "factor": llama3, **_LLAMA3}
    return {"rope_theta": float(a.rotary_base), "rope_scaling": scaling}


def positive_number(name: str, value: object) -> float:
    """A value of a config.json, in its unit there, if it is such a number.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, (int, float)) or value not in ABOVE_ZERO:
        raise out_of_range(name, value, f"numbers {ABOVE_ZERO}")
    return float(value)
