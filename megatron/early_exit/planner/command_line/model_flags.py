"""The flags with which a model and its exits are described, with Megatron's names."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.huggingface_config import CONFIG_NAME, read_sizes
from megatron.early_exit.checkpoint.text_files import read_json
from megatron.early_exit.config import HEAD_FIELDS, EarlyExitConfig
from megatron.early_exit.errors import FieldError, as_flag, out_of_range
from megatron.early_exit.planner.command_line.expert_flags import (
    add_expert_flags,
    experts_of_config,
    read_experts,
)
from megatron.early_exit.planner.command_line.unmodelled_entries import (
    refuse_unmodelled_entries,
)
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.named_models import NAMED_MODELS

_SIZES = {
    "num_layers": "backbone layers",
    "hidden_size": "width of the hidden state",
    "ffn_hidden_size": "width of the MLP (default: Megatron's, 8/3 of the hidden size, or 4 times "
    "the hidden size with --no-swiglu)",
    "num_attention_heads": "query heads",
    "num_query_groups": "key and value heads (default: as many as query heads)",
    "kv_channels": "size of a head (default: hidden size / query heads)",
    "vocab_size": "tokens of the vocabulary",
    "seq_length": "tokens of a sequence (default of a config.json: its whole context)",
}
_SHARED = "share_embeddings_and_output_weights"
_GATED = "gated_linear_unit"
# Model types of Hugging Face's whose MLP has no gate.
_WITHOUT_GATE = ("nemotron", "phi", "starcoder2")
_NO_MTP = "what a multi-token-prediction module takes is not planned"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the flags describe.

    Attributes:
        name: the name for titles.
        shape: the shape of the model.
        placements: the same exits in all placements that are allowed.
        global_batch_size: sequences of a step; None if neither flags nor --config say it.
    """

    name: str
    shape: ModelShape
    placements: tuple[EarlyExitConfig, ...]
    global_batch_size: int | None


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags of a model and its exits to a command line."""
    group = parser.add_argument_group("model", "these flags override --config")
    add = group.add_argument
    add(
        "--config",
        metavar="NAME|PATH",
        help=f"{', '.join(NAMED_MODELS)}, with the exits of the papers; or a config.json of "
        "Hugging Face's Llama family, Mixtral or Qwen's mixtures, or its folder",
    )
    for name, text in _SIZES.items():
        add(as_flag(name), type=int, help=text)
    gate = "the MLP has no gate, as with GELU or Megatron's --squared-relu (default: gated)"
    add("--no-swiglu", action="store_true", help=gate)
    add("--untie-embeddings-and-output-weights", action="store_true", help="as Megatron's flag")
    add("--global-batch-size", type=int, help="sequences of a step")
    ahead = "depths of a multi-token-prediction module: only 0, since its costs are not known here"
    add("--mtp-num-layers", type=int, default=0, help=ahead)
    add_expert_flags(parser)
    group = parser.add_argument_group("exits")
    add = group.add_argument
    add(
        "--exit-layer-nums",
        type=int,
        nargs="*",
        help="layers with an exit after them, or with --pre-exit before them; nothing for no exits",
    )
    add("--pre-exit", action="store_true", help="plan this placement only (default: the better)")
    for name, part in HEAD_FIELDS.items():
        add(as_flag(name), action="store_true", help=part.help_when_planned)
    add(
        "--share-final-head",
        action="store_true",
        help="all exits predict with the model's final norm and output layer",
    )
    add("--exit-vocab-size", type=int, help="exits can predict only this many first tokens")


def read_model(args: Namespace) -> Model:
    """The model that the flags describe.

    Raises:
        ValueError: a value is missing or out of range; the message names its flag.
    """
    if args.mtp_num_layers:
        raise out_of_range("--mtp-num-layers", args.mtp_num_layers, f"0: {_NO_MTP}")
    named = NAMED_MODELS.get((args.config or "").lower())
    known: dict[str, Any] = {}
    if named is not None:
        known = {name: getattr(named.shape, name) for name in (*_SIZES, _SHARED, _GATED, "experts")}
    elif args.config is not None:
        if not Path(args.config).exists():
            raise ValueError(
                f"--config {args.config} is neither a model nor a file, allowed: "
                f"{', '.join(NAMED_MODELS)}, or a path"
            )
        known = _read_config(Path(args.config), args.seq_length)
    shape = _shape(args, known)
    exits = _exits(args, EarlyExitConfig() if named is None else named.exits)
    exits.validate(shape.num_layers, shape.vocab_size)
    ways = (exits.placed(True),) if args.pre_exit else placements(exits, shape.num_layers)
    batch: int | None = args.global_batch_size
    if batch is None and named is not None:
        batch = named.global_batch_size
    return Model(
        name=args.config or "model",
        shape=shape,
        placements=ways,
        global_batch_size=batch,
    )


def placements(exits: EarlyExitConfig, num_layers: int) -> tuple[EarlyExitConfig, ...]:
    """The placements that exits can have. --pre-exit is impossible for exits with an MLP, which
    replaces that of the layer before the exit, and for an exit after the last layer."""
    after = exits.placed(False)
    if not exits.positions or exits.replaces_mlp or exits.positions[-1] >= num_layers:
        return (after,)
    return after, exits.placed(True)


def _read_config(path: Path, seq_length: int | None) -> dict[str, Any]:
    """The fields of a `ModelShape` in a config.json, or in that of a folder; the length of a
    sequence is its whole context, unless another is given."""
    try:
        config = read_json(path / CONFIG_NAME if path.is_dir() else path)
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    if depths := config.get("num_nextn_predict_layers"):
        raise ValueError(
            f"--config {path}: num_nextn_predict_layers {depths}, allowed: 0: {_NO_MTP}"
        )
    try:
        sizes = read_sizes(config)
        refuse_unmodelled_entries(config, seq_length or sizes["max_position_embeddings"])
        sizes["experts"] = experts_of_config(config)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if config.get("head_dim") is None:
        # It follows from sizes that flags may change.
        del sizes["kv_channels"]
    sizes["seq_length"] = sizes["max_position_embeddings"]
    known = {name: sizes[name] for name in (*_SIZES, _SHARED, "experts") if name in sizes}
    return {**known, _GATED: config.get("model_type") not in _WITHOUT_GATE}


def _head_size(hidden_size: int | None, num_heads: int | None) -> dict[str, int]:
    """The size of a head that is not given."""
    if not hidden_size or not num_heads or num_heads < 1:
        # Missing, or refused by the name of the size that is out of range.
        return {"kv_channels": 1}
    if hidden_size % num_heads:
        allowed = f"divisors of --hidden-size {hidden_size}, or --kv-channels"
        raise out_of_range("--num-attention-heads", num_heads, allowed)
    return {"kv_channels": hidden_size // num_heads}


def _exits(args: Namespace, known: EarlyExitConfig) -> EarlyExitConfig:
    numbers = known.exit_layer_nums if args.exit_layer_nums is None else args.exit_layer_nums
    heads: dict[str, Any] = {
        name: bool(getattr(args, name) or (numbers and getattr(known, name)))
        for name in HEAD_FIELDS
    }
    return EarlyExitConfig(
        exit_layer_nums=tuple(numbers),
        pre_exit=args.pre_exit and args.exit_layer_nums is not None,
        share_final_head=args.share_final_head,
        exit_vocab_size=args.exit_vocab_size,
        **heads,
    )


def _shape(args: Namespace, known: Mapping[str, Any]) -> ModelShape:
    sizes = {**known, **{n: v for n in _SIZES if (v := getattr(args, n)) is not None}}
    sizes[_GATED] = sizes.get(_GATED, True) and not args.no_swiglu
    if args.num_query_groups is None and (args.num_attention_heads is not None or not known):
        sizes["num_query_groups"] = sizes.get("num_attention_heads", 1)
    if args.ffn_hidden_size is None and (args.hidden_size is not None or not known):
        hidden_size = sizes.get("hidden_size", 1)
        gated_width = int(4 * hidden_size * 2 / 3 / 64) * 64
        sizes["ffn_hidden_size"] = gated_width if sizes[_GATED] else 4 * hidden_size
    if args.kv_channels is None and (
        args.hidden_size is not None or args.num_attention_heads is not None
    ):
        sizes.pop("kv_channels", None)
    if "kv_channels" not in sizes:
        sizes |= _head_size(sizes.get("hidden_size"), sizes.get("num_attention_heads"))
    missing = [as_flag(name) for name in _SIZES if name not in sizes]
    if missing:
        raise ValueError(f"{' '.join(missing)} missing, allowed: these flags, or --config")
    if args.untie_embeddings_and_output_weights:
        sizes[_SHARED] = False
    elif not known:
        sizes[_SHARED] = True
    sizes["experts"] = read_experts(args, sizes.get("experts"), sizes["ffn_hidden_size"])
    try:
        return ModelShape.llama(**sizes)
    except FieldError as error:
        raise ValueError(error.named(as_flag(error.field))) from None
