"""From the command line to Megatron's checked arguments, with the exits restored on request.

These are the steps of Megatron's own `parse_and_validate_args`, taken one by one, because the exits
stored in a checkpoint belong between two of them.
"""

import os
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import print_rank_0

from megatron.early_exit.checkpoint.description import read_saved_description
from megatron.early_exit.checkpoint.location import TOKENIZER_NAME
from megatron.early_exit.config import PER_EXIT_DEFAULTS, EarlyExitConfig
from megatron.early_exit.data.tokenizer import (
    check_tokenizer_arguments,
    complete_tokenizer_arguments,
)
from megatron.early_exit.errors import as_flag, one_line
from megatron.early_exit.patches.distributed_optimizer import IS_KNOWN_VERSION
from megatron.early_exit.training.cli.arguments import add_early_exit_arguments
from megatron.early_exit.training.cli.flag_rules.dependent import DEPENDENT
from megatron.early_exit.training.cli.flag_rules.rule import check_rules
from megatron.early_exit.training.cli.flag_rules.unsupported import UNSUPPORTED
from megatron.early_exit.training.cli.given_flags import given_arguments
from megatron.early_exit.training.cli.number_ranges import (
    check_batch_size_schedule,
    check_combinations,
    check_numbers,
)
from megatron.early_exit.training.loop.filling_options import FillingOptions, plan_fills
from megatron.early_exit.training.resume.plan import (
    find_checkpoint,
    is_torch_dist,
)
from megatron.early_exit.training.resume.stored_model import StoredModel, describe_exits
from megatron.early_exit.training.tuning.options import TuningOptions, plan_depth

_SHARED_DIRECTORY_TIMEOUT_S = 120.0
_HEAD_START_S = 15.0
_EVAL_INTERVAL = 1000

# Functions of Megatron's that set something up, and the flags that say what.
_SET_UP_BY = {
    "_build_tokenizer": ("the tokenizer", ("tokenizer_type", "tokenizer_model")),
    "_set_tensorboard_writer": ("TensorBoard", ("tensorboard_dir",)),
    "_set_wandb_writer": ("W&B", ("wandb_project", "wandb_exp_name", "wandb_save_dir")),
    "_set_timers": ("timers", ("timing_log_level", "timing_log_option")),
}


def run_as_one_process_without_launcher() -> None:
    """Set what torchrun sets, for a run that was started without it."""
    if "RANK" in os.environ:
        return
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(one)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # Whichever is free: nobody else has to find it.
    os.environ.setdefault("MASTER_PORT", "0")


def refuse(message: str) -> int:
    """Say what is wrong with the command line or the files it names, once for all ranks.

    What every rank has found, rank 0 says, and torchrun then ends the others; so they wait. One
    that has still not been ended knows what rank 0 does not, and speaks for itself.

    Returns:
        The exit status.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_HEAD_START_S)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def parse_arguments(
    set_defaults: Callable[[ArgumentParser], None], check_machine: Callable[[Namespace], None]
) -> Namespace:
    """Parse and check the command line, and set Megatron's globals from it.

    Args:
        set_defaults: given the parser with all flags, to change defaults.
        check_machine: given the parsed arguments, to refuse what the machine lacks.

    Raises:
        ValueError: a flag is unknown or outside its range.
        AssertionError: Megatron refuses a flag.
    """
    parsers = []

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        parser.error = _raise  # type: ignore[method-assign]
        add_early_exit_arguments(parser)
        _add_checkpoint_arguments(parser)
        # Megatron divides by it even where it never evaluates.
        parser.set_defaults(eval_interval=_EVAL_INTERVAL)
        set_defaults(parser)
        _mend_help(parser)
        return parser

    # Megatron would open the file while it parses.
    if any(argument.split("=")[0] == "--yaml-cfg" for argument in sys.argv[1:]):
        raise ValueError("--yaml-cfg is not supported, give the flags themselves")
    args = parse_args(add_arguments)
    given = given_arguments(parsers[0])
    check_rules(UNSUPPORTED, parsers[0], args, given)
    own_mtp = {name: getattr(args, name) for name in _OF_MTP}
    stored = _restore_from_checkpoint(args, given) if args.use_checkpoint_args else None
    _restore_mtp(args, own_mtp, given)
    if stored is None:
        exits = EarlyExitConfig.from_attributes(args)
    else:
        exits = restore_exits(args, stored, given)
        print_rank_0(f"exits of the checkpoint restored: {describe_exits(exits)}")
    tuning = TuningOptions.from_attributes(args)
    if args.num_layers is not None:
        exits.validate(args.num_layers)
    elif tuning.tune_exit:
        raise ValueError("--tune-exit needs --num-layers or --use-checkpoint-args")
    if tuning.tune_exit:
        plan_depth(args, tuning, exits)
    check_machine(args)
    check_rules(DEPENDENT, parsers[0], args, given)
    check_numbers(args)
    check_combinations(args)
    validate_args(args)
    check_batch_size_schedule(args)
    filling = FillingOptions.from_attributes(args)
    if filling.fill_explicit_bubbles:
        print_rank_0(plan_fills(args, filling, exits))
    check_tokenizer_arguments(args)
    complete_tokenizer_arguments(args)
    _set_up_globals(args)
    for name, value in exits.to_dict().items():
        setattr(args, name, value)
    return args


def _set_up_globals(args: Namespace) -> None:
    """Megatron's: tokenizer, TensorBoard, W&B; each library has its own way of refusing."""
    try:
        set_global_variables(args)
    except Exception as error:
        names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        blamed = next((what for function, what in _SET_UP_BY.items() if function in names), None)
        if blamed is None:
            raise
        subject, flags = blamed
        values = [f"{as_flag(name)} {getattr(args, name)}" for name in flags]
        reason = one_line(error)
        raise ValueError(f"{subject} ({' '.join(values)}) cannot be set up: {reason}") from error


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _mend_help(parser: ArgumentParser) -> None:
    """Escape the percent signs that keep Megatron's own `--help` from being printed."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _add_checkpoint_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(title="early exit (checkpoints)")
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer's state faster, but so that it only loads at the "
        "tensor and pipeline parallel sizes that saved it (default: it loads at any).",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=IS_KNOWN_VERSION)


def _restore_from_checkpoint(args: Namespace, given: frozenset[str]) -> EarlyExitConfig | None:
    """Set the backbone's arguments from the checkpoint; returns the exits stored in it."""
    if args.moe_use_upcycling:
        raise ValueError(
            "--use-checkpoint-args cannot be combined with --moe-use-upcycling: give the new "
            "model's flags themselves"
        )
    if not is_torch_dist(args):
        raise ValueError(
            f"--use-checkpoint-args cannot be combined with --ckpt-format {args.ckpt_format}, "
            "allowed: torch_dist"
        )
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--use-checkpoint-args needs --load or --pretrained-checkpoint")
    path = _find_on_every_rank(args)
    if path is None:
        return None
    on_command_line = args.tokenizer_type, args.tokenizer_model
    load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
    load_args_from_checkpoint(args)
    stored = StoredModel(path)
    _restore_the_rest(args, stored.args, given)
    description = read_saved_description(path.parent)
    if given & {"tokenizer_type", "tokenizer_model"}:
        args.tokenizer_type, args.tokenizer_model = on_command_line
    elif description is not None and description.tokenizer is not None:
        # The copy that travels with the checkpoint, not the file that it was made from.
        kept = description.tokenizer
        args.tokenizer_type = kept.type
        args.tokenizer_sentencepiece_legacy |= kept.legacy
        args.vocab_extra_ids = args.vocab_extra_ids or kept.num_extra_ids
        if kept.model is not None:
            args.tokenizer_model = str(path.parent / TOKENIZER_NAME / kept.model)
    if args.vocab_size is None:
        args.vocab_size = getattr(stored.args, "vocab_size", None)
    return stored.exits


def _restore_the_rest(args: Namespace, stored: object, given: frozenset[str]) -> None:
    """What shapes a model too, and Megatron does not restore."""
    for name in _NOT_RESTORED - given:
        if hasattr(stored, name):
            setattr(args, name, getattr(stored, name))
    if getattr(stored, "full_num_layers", None) is not None and "num_layers" not in given:
        args.num_layers = stored.full_num_layers  # type: ignore[attr-defined]


def _restore_mtp(args: Namespace, own: dict[str, object], given: frozenset[str]) -> None:
    """Let the command line say what a checkpoint's arguments would: of a run that tunes heads on
    a model all, since it trains only the look-ahead head that it asks for."""
    source = find_checkpoint(args) if args.tune_exit and args.use_checkpoint_args else None
    saved = None if source is None else read_saved_description(source.directory)
    is_of_model = source is not None and (saved is None or saved.base is None)
    for name in own if is_of_model else own.keys() & given:
        setattr(args, name, own[name])
    # Megatron builds an empty module for 0.
    args.mtp_num_layers = args.mtp_num_layers or None


def _find_on_every_rank(args: Namespace) -> Path | None:
    """The checkpoint that gives the arguments; ranks wait until rank 0 has mended its directory."""
    deadline = time.monotonic() + _SHARED_DIRECTORY_TIMEOUT_S
    while True:
        source = find_checkpoint(args)
        if source is None:
            return None
        if args.rank == 0 or source.is_named:
            args.ckpt_step = source.ckpt_step
            return source.checkpoint.path
        if time.monotonic() > deadline:
            raise ValueError(f"rank 0 does not mend {source.checkpoint.path.parent}, is it shared?")
        time.sleep(0.2)


def restore_exits(args: object, stored: EarlyExitConfig, given: frozenset[str]) -> EarlyExitConfig:
    """The exits of a checkpoint, with what is on the command line put in their place.

    Args:
        args: the command line's values.
        stored: those of the checkpoint.
        given: the fields that are on the command line.

    Raises:
        ValueError: the two do not go together.
    """
    from_checkpoint = {f.name for f in fields(EarlyExitConfig)} - given
    if "exit_layer_nums" in given:
        # What is listed in the order of the layers belongs to the list that it came with.
        from_checkpoint -= {"pre_exit", *PER_EXIT_DEFAULTS}
    values = {name: getattr(stored, name) for name in from_checkpoint}
    for name in given & {f.name for f in fields(EarlyExitConfig)}:
        values[name] = getattr(args, name)
    if "exit_layer_nums" in from_checkpoint:
        values["exit_layer_nums"] = stored.placed(values["pre_exit"]).exit_layer_nums
    return EarlyExitConfig(**values)


_OF_MTP = ("mtp_num_layers", "mtp_use_repeated_layer")
_NOT_RESTORED = frozenset(
    {
        *("layernorm_epsilon", "norm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm"),
        *("quick_geglu", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
        *("softmax_scale", "use_rope_scaling"),
    }
)
