"""What command lines that measure a model have in common."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.location import DESCRIPTION_NAME, locate
from megatron.early_exit.checkpoint.stored_rule import described_without_rule
from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import FieldError, as_flag, one_line
from megatron.early_exit.evaluation.library_items import MAKERS
from megatron.early_exit.evaluation.provenance import fingerprint
from megatron.early_exit.evaluation.rule import exits_name
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.hardware.dtypes import NAMES
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.engine_flags import add_engine_flags, load_engine

_INTERRUPTED = 130


def add_measured_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags with which an engine is loaded that is measured."""
    add_engine_flags(parser)
    # A prompt that is found in a cache would flatter whatever comes second.
    parser.set_defaults(compile=None, max_batch_size=None, enable_prefix_caching=False)
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        default=None,
        help="measure plain layers (default: compiled ones where they can be)",
    )


def add_task_flags(add: Callable[..., Any], files: str) -> None:
    """Add the flag of what is asked.

    Args:
        add: `add_argument` of a parser or a group.
        files: what the files have in them.
    """
    add(
        "--tasks",
        nargs="+",
        default=list(MAKERS),
        help=f"{', '.join(MAKERS)}, or .jsonl files{files} (default: {' '.join(MAKERS)})",
    )


def add_numbers(
    add: Callable[..., Any], texts: Mapping[str, str], defaults: Mapping[str, int]
) -> None:
    """Add flags of whole numbers.

    Args:
        add: `add_argument` of a parser or a group.
        texts: flag -> what it is.
        defaults: field -> its default.
    """
    for flag, text in texts.items():
        default = defaults[flag.removeprefix("--").replace("-", "_")]
        add(flag, type=int, default=default, help=f"{text} (default: %(default)s)")


def add_rule_flags(
    add: Callable[..., Any], thresholds: Sequence[float], shown: str, exits_shown: str
) -> None:
    """Add the flags of the rules that are measured.

    Args:
        add: `add_argument` of a parser or a group.
        thresholds: the default.
        shown: the default in words.
        exits_shown: the sets of exits that are asked by default, in words.
    """
    add(
        "--thresholds",
        nargs="+",
        type=float,
        default=list(thresholds),
        help=f"least confidences with which a token leaves at an exit (default: {shown})",
    )
    add(
        "--measures",
        nargs="+",
        choices=get_args(ExitMeasure),
        help="measures of confidence (default: the model's)",
    )
    policies = list(get_args(KVPolicy))
    add(
        "--kv-policies",
        nargs="+",
        choices=policies,
        default=policies,
        help=f"what later tokens see of one that has left (default: {' '.join(policies)})",
    )
    add(
        "--exit-layers",
        nargs="+",
        type=exit_set,
        metavar="SET",
        help=f"sets of exits that are asked, such as 4 8 4+8, or all (default: {exits_shown})",
    )


def settings_of(args: argparse.Namespace, **others: Any) -> Settings:
    """The settings that the flags above give.

    Args:
        args: the flags, with those of all numbers that both command lines have.
        others: further settings.

    Raises:
        ValueError: a value is out of range; the message names its flag.
    """
    return checked(
        Settings,
        tasks=tuple(args.tasks),
        items=args.items,
        prompt_characters=args.prompt_characters,
        thresholds=tuple(args.thresholds),
        measures=tuple(args.measures or get_args(ExitMeasure)),
        kv_policies=tuple(args.kv_policies),
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        seed=args.seed,
        **others,
    )


def exit_status(run: Callable[[], int]) -> int:
    """The status of a command that goes on where it was stopped: what keeps it from its work is a
    line on the error output, and status 2.

    Args:
        run: the command, which returns its status.
    """
    try:
        return run()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return _INTERRUPTED


def exit_set(text: str) -> tuple[int, ...] | None:
    """Exits of a text such as `4+8`, in ascending order; None for `all`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if text == exits_name(None):
        return None
    parts = text.split("+")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no set of exits, allowed: numbers of layers, such as 4+8, or all"
        )
    return tuple(sorted(map(int, parts)))


def load(args: argparse.Namespace, batch_size: int | None = None) -> EarlyExitEngine:
    """Load the engine, with compiled layers where they can be if nothing was said of that.

    A rule that is stored with the model has no part in what is measured.

    Args:
        args: the flags.
        batch_size: prompts that are answered together; None is single ones.

    Raises:
        ValueError: see `load_engine`; or a flag cannot be combined with a fair measurement.
    """
    if args.enable_prefix_caching:
        raise ValueError(
            "--enable-prefix-caching is refused: a prompt that is found in a cache would flatter "
            "whatever comes second, allowed: without it"
        )
    if args.max_batch_size is not None:
        raise ValueError(
            f"--max-batch-size {args.max_batch_size} is refused: it is chosen by how many prompts "
            "are answered together, allowed: without it"
        )
    refuse_given(args, ["draft_vocab_size"], "where nothing is drafted")
    args.max_batch_size = batch_size or 1
    if args.compile is not None:
        return load_engine(args, use_stored_rule=False)
    args.compile = True
    try:
        return load_engine(args, use_stored_rule=False)
    except ValueError as error:
        args.compile = False
        engine = load_engine(args, use_stored_rule=False)
        print(f"plain layers are measured: {error}", file=sys.stderr)
        return engine


def checked[T](make: Callable[..., T], *given: Any, **values: Any) -> T:
    """What a function makes of values.

    Raises:
        ValueError: one is out of range; the message names its flag.
    """
    try:
        return make(*given, **values)
    except FieldError as error:
        raise ValueError(error.named(as_flag(error.field))) from error


def measures_of(args: argparse.Namespace, engine: EarlyExitEngine) -> tuple[ExitMeasure, ...]:
    """The measures of confidence, by default what is stored with the model.

    Raises:
        ValueError: the model does not have one of them.
    """
    for measure in args.measures or ():
        if measure not in engine.exit_measures:
            allowed = " ".join(engine.exit_measures)
            raise ValueError(f"--measures {measure}: the exits have no gates, allowed: {allowed}")
    return tuple(args.measures or [engine.exit_measure])


def about_model(args: argparse.Namespace, engine: EarlyExitEngine) -> dict[str, Any]:
    """How the model was loaded, as JSON has it."""
    location = locate(args.load)
    has_description = (location.save_dir / DESCRIPTION_NAME).is_file()
    described = described_without_rule(location.save_dir) if has_description else None
    return {
        "checkpoint": str(location.iteration_dir),
        "fingerprint": fingerprint((location.iteration_dir, location.tokenizer_dir)),
        # Without the stored rule, which changes nothing in what is measured.
        "description": described,
        "dtype": NAMES[engine.model.dtype],
        "weight_dtype": weight_dtype_of(args),
        "quantize_heads": args.quantize_heads,
        "compile": args.compile,
        "device": str(engine.model.device),
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
    }


def quantize_heads_of(args: argparse.Namespace) -> bool | None:
    """Whether projections to the vocabulary are in 8 bits, too; None where no weights are."""
    if weight_dtype_of(args) is None:
        return None
    stored = describe(locate(args.load)).quantization
    return args.quantize_heads is not False if stored is None else stored.heads


def weight_dtype_of(args: argparse.Namespace) -> str | None:
    """The bits in which weights are kept, by the flag or as they are stored; None is the dtype."""
    stored = describe(locate(args.load)).quantization
    return args.weight_dtype or (None if stored is None else stored.weight_dtype)
