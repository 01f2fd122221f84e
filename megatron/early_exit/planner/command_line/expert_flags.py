"""The experts of a model, by flags with Megatron's names or by a config.json of Hugging Face's."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from megatron.early_exit.checkpoint.huggingface_config import count
from megatron.early_exit.errors import FieldError, as_flag
from megatron.early_exit.planner.command_line.unmodelled_entries import (
    refuse_layers_without_experts,
)
from megatron.early_exit.planner.costs.experts import Experts

_FLAGS = {
    "num_experts": "experts of each layer, in place of its MLP (default: none)",
    "moe_router_topk": "experts that each token is routed to (default: 2)",
    "moe_ffn_hidden_size": "width of an expert (default: --ffn-hidden-size)",
    "moe_shared_expert_intermediate_size": "width of an MLP beside the experts (default: none)",
}
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")


def add_expert_flags(parser: ArgumentParser) -> None:
    """Add the flags of a mixture of experts to a command line."""
    group = parser.add_argument_group("mixture of experts")
    for name, text in _FLAGS.items():
        group.add_argument(as_flag(name), type=int, help=text)


def read_experts(args: Namespace, known: Experts | None, ffn_hidden_size: int) -> Experts | None:
    """The experts that the flags describe.

    Args:
        args: parsed arguments, which override `known`.
        known: the experts of a named model, or of a config.json.
        ffn_hidden_size: width of an expert if nothing else says it.

    Raises:
        ValueError: a flag is out of range, or has no effect.
    """
    given = {name: v for name in _FLAGS if (v := getattr(args, name)) is not None}
    if known is None and "num_experts" not in given:
        for name, value in given.items():
            problem = "has no effect without --num-experts"
            raise FieldError(as_flag(name), problem, value=value)
        return None
    default = {"moe_router_topk": 2, "moe_ffn_hidden_size": ffn_hidden_size}
    if known is not None:
        default = {name: getattr(known, name) for name in _FLAGS}
    try:
        return Experts(**{**default, **given})
    except FieldError as error:
        raise ValueError(error.named(as_flag(error.field))) from None


def experts_of_config(config: Mapping[str, Any]) -> Experts | None:
    """The experts in a config.json: of Mixtral, Qwen's mixtures, and what has the same entries.

    Raises:
        ValueError: an entry is missing or out of range, or describes what is not modelled.
    """
    names = [name for name in _NUMBERS if config.get(name)]
    if not names:
        return None
    refuse_layers_without_experts(config)
    width = count(config, "moe_intermediate_size", config.get("intermediate_size"))
    shared = config.get("shared_expert_intermediate_size") or 0
    if config.get("n_shared_experts"):
        shared = count(config, "n_shared_experts") * width
    return Experts(
        num_experts=count(config, names[0]),
        moe_router_topk=count(config, "num_experts_per_tok"),
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=shared,
    )
