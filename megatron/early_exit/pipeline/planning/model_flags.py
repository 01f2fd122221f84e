"""The flags with which a model and its exits are described, with Megatron's names."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.early_exit.config import EarlyExitConfig, as_flag
from megatron.early_exit.pipeline.planning.model_config import read_model_config
from megatron.early_exit.pipeline.planning.named_models import NAMED_MODELS
from megatron.early_exit.pipeline.planning.placement import placed, placements
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape

_SIZES = {
    "num_layers": "backbone layers",
    "hidden_size": "width of the hidden state",
    "ffn_hidden_size": "width of the gated MLP (default: Megatron's, 8/3 of the hidden size)",
    "num_attention_heads": "query heads",
    "num_query_groups": "key and value heads (default: as many as query heads)",
    "vocab_size": "tokens of the vocabulary",
    "seq_length": "tokens of a sequence (default of a config.json: its context, up to 4096)",
}
_HEADS = {
    "use_exit_norm": "each exit has its own norm",
    "use_exit_mlp": "each exit has its own MLP; not with --pre-exit",
    "use_exit_block": "each exit has a whole layer",
    "untie_exit_output_weights": "each exit has its own projection",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the flags describe.

    Attributes:
        name: for titles.
        shape: of the model.
        placements: the same exits in the ways in which they may be placed.
        global_batch_size: sequences of a step, None if nothing tells.
    """

    name: str
    shape: ModelShape
    placements: tuple[EarlyExitConfig, ...]
    global_batch_size: int | None


def add_model_flags(parser: ArgumentParser) -> None:
    """Add them."""
    group = parser.add_argument_group("model", "what is given here wins over --config")
    add = group.add_argument
    add(
        "--config",
        metavar="NAME|PATH",
        help=f"{', '.join(NAMED_MODELS)}, with the exits of the papers; or a config.json of "
        "Hugging Face's Llama family, or its folder",
    )
    for name, text in _SIZES.items():
        add(as_flag(name), type=int, help=text)
    add("--untie-embeddings-and-output-weights", action="store_true", help="as Megatron's flag")
    add("--global-batch-size", type=int, help="sequences of a step")
    group = parser.add_argument_group("exits")
    add = group.add_argument
    add(
        "--exit-layer-nums",
        type=int,
        nargs="*",
        help="layers with an exit after them, or with --pre-exit before them; nothing for no exits",
    )
    add("--pre-exit", action="store_true", help="plan this placement only (default: the better)")
    for name, text in _HEADS.items():
        add(as_flag(name), action="store_true", help=text)
    add("--exit-vocab-size", type=int, help="exits answer with the first so many tokens only")


def read_model(args: Namespace) -> Model:
    """The model that the flags describe.

    Raises:
        ValueError: something is missing or out of range; named by its flag.
    """
    named = NAMED_MODELS.get((args.config or "").lower())
    known: dict[str, int | bool] = {}
    if named is not None:
        known = {field.name: getattr(named.shape, field.name) for field in fields(named.shape)}
    elif args.config is not None:
        if not Path(args.config).exists():
            raise ValueError(
                f"--config {args.config} is neither a model nor a file, allowed: "
                f"{', '.join(NAMED_MODELS)}, or a path"
            )
        known = read_model_config(Path(args.config))
    shape = _shape(args, known)
    exits = _exits(args, EarlyExitConfig() if named is None else named.exits)
    exits.validate(shape.num_layers, shape.vocab_size)
    ways = (placed(exits, True),) if args.pre_exit else placements(exits, shape.num_layers)
    batch: int | None = args.global_batch_size
    if batch is None and named is not None:
        batch = named.global_batch_size
    return Model(
        name=args.config or "model",
        shape=shape,
        placements=ways,
        global_batch_size=batch,
    )


def _exits(args: Namespace, known: EarlyExitConfig) -> EarlyExitConfig:
    numbers = known.exit_layer_nums if args.exit_layer_nums is None else args.exit_layer_nums
    heads = {name: getattr(args, name) or (numbers and getattr(known, name)) for name in _HEADS}
    return EarlyExitConfig(
        exit_layer_nums=tuple(numbers),
        pre_exit=args.pre_exit and args.exit_layer_nums is not None,
        exit_vocab_size=args.exit_vocab_size,
        use_exit_norm=bool(heads["use_exit_norm"]),
        use_exit_mlp=bool(heads["use_exit_mlp"]),
        use_exit_block=bool(heads["use_exit_block"]),
        untie_exit_output_weights=bool(heads["untie_exit_output_weights"]),
    )


def _shape(args: Namespace, known: dict[str, int | bool]) -> ModelShape:
    sizes = {**known, **{n: v for n in _SIZES if (v := getattr(args, n)) is not None}}
    if args.num_query_groups is None and (args.num_attention_heads is not None or not known):
        sizes["num_query_groups"] = sizes.get("num_attention_heads", 1)
    if args.ffn_hidden_size is None and (args.hidden_size is not None or not known):
        # Megatron's, of a gated MLP.
        sizes["ffn_hidden_size"] = int(4 * sizes.get("hidden_size", 1) * 2 / 3 / 64) * 64
    missing = [as_flag(name) for name in _SIZES if name not in sizes]
    if missing:
        raise ValueError(f"{' '.join(missing)} missing, allowed: these flags, or --config")
    if args.untie_embeddings_and_output_weights:
        sizes["tied_embedding"] = False
    elif not known:
        sizes["tied_embedding"] = True
    try:
        return ModelShape(**sizes)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"{as_flag(name)} {rest}") from None
